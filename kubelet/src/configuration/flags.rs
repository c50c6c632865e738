//! The upstream's flags: most are a field of the document by another name; the others are named here. Pure.

use serde_json::{Map, Number, Value};

use super::fields::{FIELDS, Field, Kind, Support};
use super::value::parse_duration;

/// A flag, for the command line's grammar.
#[derive(Clone, Copy, Debug)]
pub struct FlagDescription {
    /// Without dashes.
    pub name: &'static str,
    /// May stand without a value.
    pub is_switch: bool,
    /// Given again, it adds to what was given.
    pub is_list: bool,
}

/// What a flag says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Setting {
    /// A field has this value.
    Field(&'static Field, Value),
    /// Something of the node's object that no field says.
    Node(&'static str, String),
    /// Nothing to set, but something to say.
    Notice(String),
}

impl PartialEq for Field {
    fn eq(&self, other: &Field) -> bool {
        self.path == other.path
    }
}

/// Flags of the upstream that are no field: what becomes of them.
const OTHERS: &[(&str, bool, Support)] = &[
    ("exit-on-lock-contention", true, Support::Ignored("the state folder has a lock of its own")),
    ("experimental-allocatable-ignore-eviction", true, Support::Ignored("hard eviction thresholds always count")),
    ("experimental-mounter-path", false, Support::Ignored("volumes are mounted by the kernel's calls")),
    ("image-credential-provider-bin-dir", false, Support::Refused("there are no credential provider plugins")),
    ("image-credential-provider-config", false, Support::Refused("there are no credential provider plugins")),
    ("lock-file", false, Support::Ignored("the state folder has a lock of its own")),
    ("maximum-dead-containers", false, Support::Ignored("one dead container of each name is kept")),
    ("maximum-dead-containers-per-container", false, Support::Ignored("one dead container of each name is kept")),
    ("minimum-container-ttl-duration", false, Support::Ignored("one dead container of each name is kept")),
    ("runtime-cgroups", false, Support::Ignored("the runtime's cgroup is not measured apart")),
];

/// Flags that say what no field does, and are acted on.
pub(super) const CLOUD_PROVIDER: &str = "cloud-provider";
pub(super) const NODE_LABELS: &str = "node-labels";

/// Every flag that [`super::Configuration::set_flag`] takes.
pub fn flag_descriptions() -> Vec<FlagDescription> {
    let fields = FIELDS.iter().filter(|field| !field.flag.is_empty());
    let fields = fields.map(|field| FlagDescription {
        name: field.flag,
        is_switch: field.kind == Kind::Bool,
        is_list: matches!(field.kind, Kind::Texts | Kind::Map | Kind::Gates | Kind::Taints),
    });
    let node = [(CLOUD_PROVIDER, false), (NODE_LABELS, true)];
    fields
        .chain(node.map(|(name, is_list)| FlagDescription { name, is_switch: false, is_list }))
        .chain(OTHERS.iter().map(|(name, is_switch, _)| FlagDescription { name, is_switch: *is_switch, is_list: false }))
        .collect()
}

/// Reads one flag; `None` where it says nothing.
pub(super) fn read(flag: &str, text: &str) -> Result<Option<Setting>, String> {
    if let Some(field) = FIELDS.iter().find(|field| field.flag == flag) {
        if field.kind == Kind::Structure {
            return Ok(Some(Setting::Notice(format!("flag --{flag} has no effect: {}", why(field.support)))));
        }
        return Ok(Some(Setting::Field(field, parse(field, text)?)));
    }
    if let Some(name) = [CLOUD_PROVIDER, NODE_LABELS].into_iter().find(|name| *name == flag) {
        return Ok(Some(Setting::Node(name, text.to_owned())));
    }
    let (_, _, support) = OTHERS.iter().find(|(name, ..)| *name == flag).ok_or("no such flag")?;
    match support {
        Support::Refused(why) | Support::RefusedInCluster(why) => Err((*why).to_owned()),
        other => Ok(Some(Setting::Notice(format!("flag --{flag} has no effect: {}", why(*other))))),
    }
}

fn why(support: Support) -> &'static str {
    match support {
        Support::InCluster(_) => "it is read from the file alone",
        Support::Inert(why) | Support::Ignored(why) | Support::Refused(why) | Support::RefusedInCluster(why) => why,
        Support::Works(_) => "it is read from the file alone",
    }
}

fn parse(field: &Field, text: &str) -> Result<Value, String> {
    let number = |parsed: Option<Number>| parsed.map(Value::Number).ok_or_else(|| format!("{text:?} is no number"));
    match field.kind {
        Kind::Bool => match text {
            "true" | "1" | "t" | "T" | "TRUE" | "True" => Ok(Value::Bool(true)),
            "false" | "0" | "f" | "F" | "FALSE" | "False" => Ok(Value::Bool(false)),
            _ => Err(format!("{text:?} is neither true nor false")),
        },
        Kind::Int => number(text.parse::<i64>().ok().map(Number::from)),
        Kind::Float => number(text.parse::<f64>().ok().and_then(Number::from_f64)),
        Kind::Duration => parse_duration(text).map(|_| Value::String(text.to_owned())),
        Kind::Text | Kind::Structure => Ok(Value::String(text.to_owned())),
        Kind::Texts => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty() && *item != "none");
            Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
        }
        Kind::Taints => text.split(',').map(str::trim).filter(|taint| !taint.is_empty()).map(parse_taint).collect(),
        Kind::Map | Kind::Gates => {
            let mut map = Map::new();
            for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
                // Thresholds are written `memory.available<100Mi`.
                let (key, value) = pair.split_once(['=', '<']).ok_or_else(|| format!("{pair:?} is not NAME=VALUE"))?;
                let value = match field.kind {
                    Kind::Gates => Value::Bool(value.parse().map_err(|_| format!("{value:?} is neither true nor false"))?),
                    _ => Value::String(value.to_owned()),
                };
                map.insert(key.to_owned(), value);
            }
            Ok(Value::Object(map))
        }
    }
}

/// `key=value:effect`, or `key:effect`.
fn parse_taint(text: &str) -> Result<Value, String> {
    let (head, effect) = text.rsplit_once(':').ok_or_else(|| format!("{text:?} is not KEY=VALUE:EFFECT"))?;
    let (key, value) = head.split_once('=').unwrap_or((head, ""));
    let mut taint = Map::new();
    for (name, text) in [("key", key), ("value", value), ("effect", effect)] {
        if !text.is_empty() {
            taint.insert(name.to_owned(), Value::String(text.to_owned()));
        }
    }
    Ok(Value::Object(taint))
}
