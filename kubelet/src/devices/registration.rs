//! The registration socket `device-plugins/kubelet.sock`, and each plugin's connection for as long as it lasts. What the lists of
//! devices mean is [`super::state`]'s business.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::Devices;
use super::plugin::Plugin;
use super::wire::v1beta1::registration_server::{Registration, RegistrationServer};
use super::wire::v1beta1::{Empty, RegisterRequest};
use crate::metrics::families;
use crate::resources::is_extended;
use crate::socket;
use crate::volume::create_private_dir;

/// The only version there is.
const VERSION: &str = "v1beta1";
/// The registration's socket.
pub(crate) const SOCKET: &str = "kubelet.sock";

/// Serves until `stop`. The sockets of before are removed first: by that plugins notice that there is a new kubelet.
pub(super) async fn run(devices: Devices, stop: CancellationToken) {
    let folder = devices.folder.clone();
    if let Err(error) = create_private_dir(&folder) {
        tracing::warn!(path = %folder.display(), %error, "no folder for device plugins");
        return;
    }
    remove_sockets(&folder);
    let service = RegistrationServer::new(Service { devices, stop: stop.clone() });
    let routes = tonic::transport::Server::builder().add_service(service);
    socket::serve(routes, &folder.join(SOCKET), stop).await;
}

fn remove_sockets(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_socket())
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "an old socket stays");
        }
    }
}

struct Service {
    devices: Devices,
    stop: CancellationToken,
}

#[tonic::async_trait]
impl Registration for Service {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        let RegisterRequest { version, endpoint, resource_name, .. } = request.into_inner();
        // As upstream, whether it is taken or not.
        self.devices.metrics.count(&families::DEVICE_REGISTRATIONS, &[&resource_name]);
        if version != VERSION {
            let text =
                format!("requested API version {version:?} is not supported by kubelet. Supported version is [{VERSION:?}]");
            return Err(refuse(&resource_name, text));
        }
        if endpoint.is_empty() || endpoint.contains('/') {
            return Err(refuse(&resource_name, format!("the endpoint {endpoint:?} is not the name of a socket beside this one")));
        }
        let socket = self.devices.folder.join(&endpoint);
        let connected = connect(self.devices.clone(), resource_name.clone(), socket, self.stop.clone());
        // A plugin that gives up asking is not to leave half a registration behind.
        match tokio::spawn(connected).await {
            Ok(Ok(())) => Ok(Response::new(Empty {})),
            Ok(Err(text)) => Err(refuse(&resource_name, text)),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }
}

fn refuse(resource: &str, text: String) -> Status {
    tracing::warn!(resource, "a device plugin is refused: {text}");
    Status::unknown(text)
}

/// Connects to a plugin's socket and follows its devices.
pub(super) async fn connect(devices: Devices, resource: String, socket: PathBuf, stop: CancellationToken) -> Result<(), String> {
    if !is_extended(&resource) {
        return Err(format!("the ResourceName {resource:?} is invalid"));
    }
    let plugin = Plugin::connect(&socket).await?;
    let number = devices.lock().connected(&resource, plugin.clone());
    tracing::info!(resource, socket = %socket.display(), "device plugin is registered");
    tokio::spawn(async move {
        let why = tokio::select! {
            () = stop.cancelled() => return,
            () = plugin.replaced.cancelled() => return,
            () = plugin.gone.cancelled() => "its socket has left the registry".to_owned(),
            why = follow(&devices, &plugin, &resource, number) => why,
        };
        if devices.lock().disconnected(&resource, number, Instant::now()) {
            tracing::warn!(resource, "device plugin is gone: {why}");
            devices.changed(&resource).await;
        }
    });
    Ok(())
}

/// Takes lists until there are no more; why that is.
async fn follow(devices: &Devices, plugin: &Plugin, resource: &str, number: u64) -> String {
    let mut lists = match plugin.watch().await {
        Ok(lists) => lists,
        Err(why) => return why,
    };
    loop {
        match lists.message().await {
            Ok(Some(list)) => {
                if devices.lock().listed(resource, number, list) {
                    devices.changed(resource).await;
                }
            }
            Ok(None) => return "its list has ended".to_owned(),
            Err(status) => return crate::cri::status_text(&status),
        }
    }
}

impl Devices {
    /// Takes a plugin that was found in the registry of plugins.
    pub(crate) async fn plug(
        &self,
        resource: &str,
        versions: &[String],
        socket: PathBuf,
        stop: &CancellationToken,
    ) -> Result<(), String> {
        if !versions.iter().any(|version| version == VERSION) {
            return Err(format!("manager version, {VERSION}, is not among plugin supported versions {versions:?}"));
        }
        connect(self.clone(), resource.to_owned(), socket, stop.clone()).await
    }

    /// Lets go of a plugin whose socket has left the registry.
    pub(crate) fn unplug(&self, resource: &str) {
        let Some(plugin) = self.lock().plugin(resource) else { return };
        plugin.gone.cancel();
    }

    /// Keeps what has changed, and has those look who depend on it.
    async fn changed(&self, resource: &str) {
        let (all, healthy) = self.lock().capacity().get(resource).copied().unwrap_or_default();
        tracing::info!(resource, devices = all, healthy, "devices have changed");
        self.save_now().await;
        self.control.devices_changed(resource);
    }
}
