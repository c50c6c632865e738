//! Makes the images that critest and our measurements pull, out of this machine's packages, as one OCI layout whose reference
//! names are the images' names without a registry: `mkimages FOLDER`. Also writes FOLDER/DIGEST, the digest critest pulls by.
#![allow(clippy::print_stdout, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use berth_testkit::TempState;
use berth_testkit::image::{Layer, Layout, PATH_ENV};
use berth_testkit::rootfs::{BUSYBOX, GROUP, PASSWD, busybox_applets};
use serde_json::{Value, json};

const PAUSE: &str = "#include <signal.h>\n#include <unistd.h>\nstatic void end(int s){(void)s;_exit(0);}\n\
int main(void){signal(SIGTERM,end);signal(SIGINT,end);signal(SIGCHLD,SIG_IGN);for(;;)pause();}\n";
const SHOW_UID: &str =
    "#include <stdio.h>\n#include <unistd.h>\nint main(void){printf(\"Effective uid: %d\\n\",geteuid());return 0;}\n";
const NGINX_PAGE: &str =
    "<!DOCTYPE html><html><head><title>Welcome to nginx!</title></head><body><h1>Welcome to nginx!</h1></body></html>\n";

fn main() -> Result<()> {
    let out = PathBuf::from(std::env::args_os().nth(1).context("usage: mkimages FOLDER")?);
    let work = TempState::new();
    let mut images = Images {
        layout: Layout::create(&out.join("layout")),
        base: base(&work)?,
        shell: json!({"Env": [PATH_ENV], "Cmd": ["sh"]}),
    };
    images.pauses(&compiled(&work, "pause", PAUSE)?);
    images.shells(&compiled(&work, "nnp", SHOW_UID)?);
    images.web_servers()?;
    let digest = images.validation();
    fs::write(out.join("DIGEST"), &digest)?;
    println!("{digest}");
    Ok(())
}

struct Images {
    layout: Layout,
    base: Vec<u8>,
    shell: Value,
}

impl Images {
    fn pauses(&mut self, pause: &Path) {
        let layer = Layer::new().copy("pause", 0o755, pause).into_tar();
        for tag in ["3.8", "3.9", "3.10", "3.10.1", "3.10.2"] {
            let config = json!({"Env": [PATH_ENV], "Entrypoint": ["/pause"], "User": "65535:65535", "Labels": {"version": tag}});
            self.layout.image(&format!("pause:{tag}"), std::slice::from_ref(&layer), &config);
        }
    }

    fn shells(&mut self, show_uid: &Path) {
        for name in ["busybox:1.29-2", "busybox:1.29-4", "busybox:1.37.0-1"] {
            self.layout.image(&format!("e2e-test-images/{name}"), std::slice::from_ref(&self.base), &self.shell);
        }
        self.layout.image("library/busybox:latest", std::slice::from_ref(&self.base), &self.shell);
        let set_uid = Layer::new().copy("usr/bin/nnp", 0o4755, show_uid).into_tar();
        let config = json!({"Env": [PATH_ENV], "Entrypoint": ["/usr/bin/nnp"]});
        self.layout.image("e2e-test-images/nonewprivs:1.3", &[self.base.clone(), set_uid], &config);
    }

    fn web_servers(&mut self) -> Result<()> {
        for (port, name) in [
            (80, "e2e-test-images/nginx:1.14-2"),
            (80, "e2e-test-images/nginx:1.14-4"),
            (12003, "k8s-staging-cri-tools/hostnet-nginx-amd64:latest"),
            (12003, "k8s-staging-cri-tools/hostnet-nginx-arm64:latest"),
        ] {
            let exposed = format!("{port}/tcp");
            let config = json!({"Env": [PATH_ENV], "Cmd": ["nginx", "-g", "daemon off;"], "ExposedPorts": {exposed: {}}, "StopSignal": "SIGQUIT"});
            self.layout.image(name, &[self.base.clone(), nginx(port)?], &config);
        }
        let config = json!({"Env": [PATH_ENV], "Cmd": ["apache2", "-f", "/etc/httpd.conf", "-DFOREGROUND"]});
        self.layout.image("e2e-test-images/httpd:2.4.39-4", &[self.base.clone(), apache()?], &config);
        Ok(())
    }

    /// The images of critest's image specs; returns the digest of the one that is pulled by digest.
    fn validation(&mut self) -> String {
        const PREFIX: &str = "k8s-staging-cri-tools/";
        let mut by_digest = String::new();
        for name in ["test-image-1", "test-image-2", "test-image-3", "test-image-latest", "test-image-digest"] {
            by_digest = self.marked(&format!("{PREFIX}{name}:latest"), name);
        }
        for tag in ["1", "2", "3"] {
            self.marked(&format!("{PREFIX}test-image-tags:{tag}"), "same-image");
        }
        for tag in ["test", "all"] {
            self.marked(&format!("{PREFIX}test-image-tag:{tag}"), "test-image-tag");
        }
        for (name, user) in
            [("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:1004"), ("username-group", "www-data:1004")]
        {
            let config = json!({"Env": [PATH_ENV], "Cmd": ["sh"], "User": user});
            self.layout.image(&format!("{PREFIX}test-image-user-{name}:latest"), std::slice::from_ref(&self.base), &config);
        }
        let groups = Layer::new()
            .file("etc/passwd", 0o644, format!("{PASSWD}default-user:x:1000:1000::/home/default-user:/bin/sh\n"))
            .file("etc/group", 0o644, format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"));
        let config = json!({"Env": [PATH_ENV], "Cmd": ["sh"], "User": "1000"});
        self.layout.image(
            &format!("{PREFIX}test-image-predefined-group:latest"),
            &[self.base.clone(), groups.into_tar()],
            &config,
        );
        by_digest
    }

    fn marked(&mut self, name: &str, file: &str) -> String {
        let mark = Layer::new().file(file, 0o644, "").into_tar();
        self.layout.image(name, &[self.base.clone(), mark], &self.shell)
    }
}

/// Busybox, and the programs critest runs that Debian's busybox lacks.
fn base(work: &TempState) -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    for dir in [
        "bin", "etc", "dev", "proc", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/www", "home", "lib", "lib64", "usr/lib",
        "run", "var/log", "sbin",
    ] {
        layer = layer.dir(dir, 0o755);
    }
    layer = layer.symlink("var/run", "/run").dir("tmp", 0o1777).dir("root", 0o700);
    layer = layer.copy("bin/busybox", 0o755, Path::new(BUSYBOX));
    layer = layer.file("etc/passwd", 0o644, PASSWD).file("etc/group", 0o644, GROUP);
    layer = layer.file("etc/shadow", 0o640, "root:*:19000:0:99999:7:::\n").file("etc/nsswitch.conf", 0o644, "hosts: files dns\n");
    let mut have: BTreeSet<String> = BTreeSet::from(["bin/busybox".into(), "bin/sh".into()]);
    // Hard links, as in the real image: critest masks /bin/ls and then runs /bin/sh.
    for applet in busybox_applets() {
        let path = format!("bin/{applet}");
        if have.insert(path.clone()) {
            layer = layer.hardlink(&path, "bin/busybox");
        }
    }
    // A shell that prefers the programs on its PATH over its own applets and words errors as critest expects: Debian's shared
    // busybox, unpacked and not installed, because it conflicts with busybox-static.
    let shell = shared_busybox(work)?;
    layer = layer.copy("bin/sh", 0o755, &shell);
    let mut wanted = libraries(&shell)?;
    for program in ["/bin/dash", "/usr/bin/pgrep", "/usr/bin/ipcs", "/usr/bin/ipcmk", "/usr/bin/mountpoint"] {
        if Path::new(program).exists() {
            wanted.push(program.into());
            wanted.extend(libraries(Path::new(program))?);
        }
    }
    for path in wanted {
        let name = path.to_string_lossy().trim_start_matches('/').to_owned();
        if have.insert(name.clone()) {
            layer = layer.copy(&name, 0o755, &path);
        }
    }
    Ok(layer.into_tar())
}

fn shared_busybox(work: &TempState) -> Result<PathBuf> {
    let dir = work.dir("busybox");
    run(Command::new("apt-get").args(["-o", "APT::Sandbox::User=root", "download", "-qq", "busybox"]).current_dir(&dir))?;
    let package =
        fs::read_dir(&dir)?.flatten().find(|e| e.path().extension().is_some_and(|x| x == "deb")).context("no busybox package")?;
    run(Command::new("dpkg").arg("-x").arg(package.path()).arg(&dir))?;
    let found = ["bin/busybox", "usr/bin/busybox"].map(|p| dir.join(p)).into_iter().find(|p| p.exists());
    found.context("the busybox package holds no busybox")
}

fn nginx(port: u16) -> Result<Vec<u8>> {
    let config = format!(
        "user root; worker_processes 1; pid /run/nginx.pid; error_log /dev/stderr; events {{ worker_connections 128; }}\n\
         http {{ access_log /dev/stdout; server {{ listen {port}; listen [::]:{port}; root /usr/share/nginx/html; index index.html; }} }}\n"
    );
    let mut layer = Layer::new();
    for dir in ["etc/nginx", "usr/share", "usr/share/nginx", "usr/share/nginx/html", "var/log/nginx", "var/lib", "var/lib/nginx"]
    {
        layer = layer.dir(dir, 0o755);
    }
    for dir in ["body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        layer = layer.dir(&format!("var/lib/nginx/{dir}"), 0o755);
    }
    layer = layer.file("etc/nginx/nginx.conf", 0o644, config).file("usr/share/nginx/html/index.html", 0o644, NGINX_PAGE);
    with_program(layer, "/usr/sbin/nginx", &[])
}

fn apache() -> Result<Vec<u8>> {
    const MODULES: &str = "usr/lib/apache2/modules";
    let files: Vec<_> =
        ["mpm_event", "authz_core", "unixd", "dir"].iter().map(|m| (*m, format!("/{MODULES}/mod_{m}.so"))).collect();
    let present: Vec<_> = files.into_iter().filter(|(_, file)| Path::new(file).exists()).collect();
    let mut config = "ServerRoot /etc\nServerName localhost\nListen 80\nPidFile /run/httpd.pid\n".to_owned();
    for (module, file) in &present {
        config += &format!("LoadModule {module}_module {file}\n");
    }
    config += "User www-data\nGroup www-data\nErrorLog /dev/stderr\nDocumentRoot /var/www\nDirectoryIndex index.html\n\
               <Directory /var/www>\nRequire all granted\n</Directory>\n";
    let layer = Layer::new().dir("usr/lib/apache2", 0o755).dir(MODULES, 0o755).file("etc/httpd.conf", 0o644, config).file(
        "var/www/index.html",
        0o644,
        "<html><body><h1>It works!</h1></body></html>\n",
    );
    let modules: Vec<_> = present.iter().map(|(_, file)| file.as_str()).collect();
    with_program(layer, "/usr/sbin/apache2", &modules)
}

/// Adds a program of this machine, more files and the shared libraries it needs.
fn with_program(mut layer: Layer, program: &str, more: &[&str]) -> Result<Vec<u8>> {
    let mut paths = vec![PathBuf::from(program)];
    paths.extend(more.iter().map(PathBuf::from));
    paths.extend(libraries(Path::new(program))?);
    for path in paths {
        layer = layer.copy(&path.to_string_lossy(), 0o755, &path);
    }
    Ok(layer.into_tar())
}

/// The absolute paths that `ldd` names for a program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let paths: BTreeSet<_> =
        text.split_whitespace().filter(|w| w.starts_with('/') && !w.ends_with(':')).map(PathBuf::from).collect();
    Ok(paths.into_iter().collect())
}

fn compiled(work: &TempState, name: &str, source: &str) -> Result<PathBuf> {
    let c = work.file(&format!("{name}.c"), source);
    let out = work.path().join(name);
    run(Command::new("gcc").args(["-Os", "-static", "-s", "-o"]).arg(&out).arg(c))?;
    Ok(out)
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {:?}", command.get_program()))?;
    ensure!(status.success(), "{:?}: {status}", command.get_program());
    Ok(())
}
