//! From a request to its handler: who may ask on which server, which paths there are, and what is refused by name.

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;

use tokio::time::Instant;

use super::caller::Caller;
use super::listen::Surface;
use super::lookup::Asked;
use super::{Api, Body, container_logs, json, numbers, pods, runtime_calls, streaming, system_logs, text};
use crate::auth::Refusal;
use crate::metrics::families;

/// The answer to a request, counted.
pub(super) async fn answer(api: &Api, surface: &Surface, caller: &Caller, request: Request<Incoming>) -> Response<Body> {
    let begun = Instant::now();
    let method = request.method().clone();
    let (path, long) = counted_as(request.uri().path(), request.uri().query());
    let response = decide(api, surface, caller, request).await;
    let server = if matches!(surface, Surface::ReadOnly) { "readonly" } else { "readwrite" };
    if !matches!(surface, Surface::HealthOnly) {
        // Anybody can make up a method: the known ones are counted.
        let known = [Method::GET, Method::POST, Method::PUT, Method::HEAD].contains(&method);
        let labels = [if known { method.as_str() } else { "other" }, path, server, if long { "true" } else { "false" }];
        api.runtime.metrics().count(&families::HTTP_REQUESTS, &labels);
        api.runtime.metrics().observe(&families::HTTP_SECONDS, &labels, begun.elapsed());
    }
    response
}

/// The upstream's name of a path in its metrics, and whether it is answered for as long as a client likes.
fn counted_as(path: &str, query: Option<&str>) -> (&'static str, bool) {
    const PAGES: [&str; 6] =
        ["metrics", "metrics/cadvisor", "metrics/resource", "metrics/probes", "metrics/slis", "stats/summary"];
    const FIRST: [&str; 12] = [
        "pods",
        "healthz",
        "configz",
        "run",
        "exec",
        "attach",
        "portForward",
        "containerLogs",
        "runningpods",
        "logs",
        "checkpoint",
        "debug",
    ];
    let path = path.trim_matches('/');
    let first = path.split('/').next().unwrap_or_default();
    let long = match first {
        "exec" | "attach" | "portForward" => true,
        "containerLogs" => query.is_some_and(|q| q.split('&').any(|pair| matches!(pair, "follow=true" | "follow=1" | "follow"))),
        _ => false,
    };
    let page = PAGES.iter().find(|page| **page == path).or_else(|| FIRST.iter().find(|name| **name == first));
    (page.copied().unwrap_or("other"), long)
}

async fn decide(api: &Api, surface: &Surface, caller: &Caller, request: Request<Incoming>) -> Response<Body> {
    if let Surface::Guarded(guard) = surface {
        match guard.admit(&caller.peer(), request.method(), request.uri().path(), request.headers()).await {
            Ok(_) => caller.let_in(),
            Err(refusal) => {
                if refusal == Refusal::Unauthorized {
                    caller.turn_away();
                }
                return refused(refusal);
            }
        }
    }
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.strip_prefix('/').unwrap_or(&path).split('/').collect();
    if parts[0] == "healthz" {
        return only(&[Method::GET], &request).unwrap_or_else(|| api.health.respond(&path, request.uri().query()));
    }
    let readable = matches!(parts[0], "pods" | "stats" | "metrics");
    match surface {
        Surface::HealthOnly => not_found(),
        Surface::ReadOnly if !readable => not_found(),
        _ if readable => shown(api, &parts, &request).await,
        Surface::Guarded(_) if !api.config.server.debugging_handlers && is_debugging(parts[0]) => {
            text(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.\n")
        }
        _ => debugged(api, &parts, request).await,
    }
}

fn refused(refusal: Refusal) -> Response<Body> {
    match refusal {
        Refusal::Unauthorized => text(StatusCode::UNAUTHORIZED, "Unauthorized"),
        Refusal::Forbidden(why) => text(StatusCode::FORBIDDEN, why),
        Refusal::Failed(why) => text(StatusCode::INTERNAL_SERVER_ERROR, why),
    }
}

fn is_debugging(first: &str) -> bool {
    ["run", "exec", "attach", "portForward", "containerLogs", "runningpods", "configz", "debug", "logs", "checkpoint"]
        .contains(&first)
}

/// What the read-only server has too.
async fn shown(api: &Api, parts: &[&str], request: &Request<Incoming>) -> Response<Body> {
    let methods: &[Method] = if parts[0] == "stats" { &[Method::GET, Method::POST] } else { &[Method::GET] };
    if let Some(refused) = only(methods, request) {
        return refused;
    }
    match parts {
        ["pods"] => pods::list(api),
        ["metrics"] => numbers::metrics(api).await,
        ["metrics", "cadvisor"] => numbers::cadvisor(api).await,
        ["metrics", "resource"] => numbers::resource(api).await,
        ["metrics", "probes"] => numbers::probes(api).await,
        ["metrics", "slis"] => numbers::slis(api).await,
        ["stats", "summary"] => numbers::stats_summary(api, request.uri().query()).await,
        _ => not_found(),
    }
}

/// What acts on pods or shows the node's inside.
async fn debugged(api: &Api, parts: &[&str], request: Request<Incoming>) -> Response<Body> {
    let either = [Method::GET, Method::POST];
    let allowed: &[Method] = match parts[0] {
        "exec" | "attach" | "portForward" => &either,
        "run" | "checkpoint" => &[Method::POST],
        "debug" => &[Method::GET, Method::POST, Method::PUT],
        _ => &[Method::GET],
    };
    if let Some(refused) = only(allowed, &request) {
        return refused;
    }
    let query = request.uri().query();
    match parts {
        ["runningpods"] | ["runningpods", ""] => pods::running(api).await,
        ["problems"] => json(StatusCode::OK, &pods::problems(api)),
        ["configz"] => runtime_calls::configz(api),
        ["containerLogs", namespace, pod, container] => container_logs::respond(api, namespace, pod, container, query).await,
        ["checkpoint", namespace, pod, container] => {
            runtime_calls::checkpoint(api, &Asked { namespace, pod, uid: None, container }, query).await
        }
        ["run", namespace, pod, container] => {
            runtime_calls::run(api, &Asked { namespace, pod, uid: None, container }, query).await
        }
        ["run", namespace, pod, uid, container] => {
            runtime_calls::run(api, &Asked { namespace, pod, uid: Some(uid), container }, query).await
        }
        ["exec", namespace, pod, container] => {
            streaming::exec(api, &Asked { namespace, pod, uid: None, container }, request).await
        }
        ["exec", namespace, pod, uid, container] => {
            streaming::exec(api, &Asked { namespace, pod, uid: Some(uid), container }, request).await
        }
        ["attach", namespace, pod, container] => {
            streaming::attach(api, &Asked { namespace, pod, uid: None, container }, request).await
        }
        ["attach", namespace, pod, uid, container] => {
            streaming::attach(api, &Asked { namespace, pod, uid: Some(uid), container }, request).await
        }
        ["portForward", namespace, pod] => forward(api, &Asked { namespace, pod, uid: None, container: "" }, request).await,
        ["portForward", namespace, pod, uid] => {
            forward(api, &Asked { namespace, pod, uid: Some(uid), container: "" }, request).await
        }
        ["logs", rest @ ..] => system_logs::respond(api, rest, query).await,
        ["debug", "pprof", ..] => text(StatusCode::NOT_IMPLEMENTED, "profiles are those of Go programs: this kubelet has none\n"),
        ["debug", "flags", ..] => {
            text(StatusCode::NOT_IMPLEMENTED, "the verbosity cannot be changed while the kubelet runs: see --log-level\n")
        }
        ["flagz" | "statusz"] => text(StatusCode::NOT_IMPLEMENTED, "z-pages are not served: /configz has the configuration\n"),
        _ => not_found(),
    }
}

async fn forward(api: &Api, asked: &Asked<'_>, request: Request<Incoming>) -> Response<Body> {
    match asked.pod(api) {
        Ok(pod) => streaming::port_forward(api, &pod, request).await,
        Err(refused) => *refused,
    }
}

fn not_found() -> Response<Body> {
    text(StatusCode::NOT_FOUND, "404 page not found\n")
}

fn only(methods: &[Method], request: &Request<Incoming>) -> Option<Response<Body>> {
    let allowed = methods.contains(request.method());
    (!allowed).then(|| text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed"))
}
