//! Reading a plugin's configuration: each field is used, known to mean nothing here, or refused by name.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Fields that every plugin's configuration may have and that the chain itself has read.
const COMMON: [&str; 8] = ["cniVersion", "name", "type", "capabilities", "prevResult", "runtimeConfig", "dns", "args"];

/// The fields of one object of the configuration that have not been read yet.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    plugin: &'a str,
    prefix: &'a str,
    left: Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The top level of a plugin's configuration.
    pub(crate) fn of_plugin(plugin: &'a str, config: &Map<String, Value>) -> Self {
        let mut left = config.clone();
        left.retain(|key, value| !COMMON.contains(&key.as_str()) && !key.starts_with("cni.dev/") && !value.is_null());
        Self { plugin, prefix: "", left }
    }

    /// An object inside it; `prefix` is its path with a dot.
    pub(crate) fn nested(plugin: &'a str, prefix: &'a str, object: Map<String, Value>) -> Self {
        let mut left = object;
        left.retain(|_, value| !value.is_null());
        Self { plugin, prefix, left }
    }

    /// Takes a field.
    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>> {
        let Some(value) = self.left.remove(name) else { return Ok(None) };
        let what = format!("{}: field {}{name}", self.plugin, self.prefix);
        serde_json::from_value(value).map(Some).map_err(Error::decode(what))
    }

    /// Takes a boolean that is false when absent.
    pub(crate) fn flag(&mut self, name: &str) -> Result<bool> {
        Ok(self.take(name)?.unwrap_or(false))
    }

    /// Takes a field that may only have the given value, which asks for nothing.
    pub(crate) fn only(&mut self, name: &str, harmless: &[Value]) -> Result<()> {
        match self.left.remove(name) {
            Some(value) if !harmless.contains(&value) => Err(self.refuse(name, &value)),
            _ => Ok(()),
        }
    }

    /// Refuses whatever is left.
    pub(crate) fn finish(self) -> Result<()> {
        match self.left.iter().next() {
            Some((name, value)) => Err(self.refuse(name, value)),
            None => Ok(()),
        }
    }

    fn refuse(&self, name: &str, value: &Value) -> Error {
        Error::UnsupportedField {
            plugin: self.plugin.to_owned(),
            field: format!("{}{name}", self.prefix),
            value: value.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    #[test]
    fn what_is_not_read_is_refused_by_name_and_value() {
        let config = object(json!({"cniVersion": "1.0.0", "type": "x", "a": true, "b": null, "c": {"d": 1}, "cni.dev/x": 1}));
        let mut fields = Fields::of_plugin("x", &config);
        assert!(fields.flag("a").unwrap());
        let error = fields.finish().unwrap_err();
        assert_eq!(error.to_string(), r#"x: unsupported field "c" with value {"d":1}"#);
        assert_eq!(error.cni_code(), 2);
    }

    #[test]
    fn harmless_values_pass_and_others_do_not() {
        for (value, ok) in [(json!(0), true), (json!(5), false)] {
            let mut fields = Fields::nested("bridge", "x.", object(json!({"vlan": value})));
            assert_eq!(fields.only("vlan", &[json!(0)]).is_ok(), ok);
        }
    }
}
