//! Which plugin has set what of which container: two plugins that set one thing is an error that names both.

use crate::Error;
use crate::api::{CompoundFieldOwners, Field, OwningPlugins};

/// The owners, in the form that validators are told.
#[derive(Debug, Default)]
pub(crate) struct Owners(OwningPlugins);

impl Owners {
    /// Claims a field, or one key of a field that has several.
    pub(crate) fn claim(&mut self, container: &str, field: Field, key: Option<&str>, plugin: &str) -> Result<(), Error> {
        let fields = self.0.owners.entry(container.to_owned()).or_default();
        let number = field as i32;
        let taken = match key {
            Some(key) => {
                let CompoundFieldOwners { owners } = fields.compound.entry(number).or_default();
                owners.insert(key.to_owned(), plugin.to_owned())
            }
            None => fields.simple.insert(number, plugin.to_owned()),
        };
        match taken {
            None => Ok(()),
            Some(first) => Err(Error::Conflict {
                first,
                second: plugin.to_owned(),
                field: match key {
                    Some(key) => format!("{} {key:?}", name(field)),
                    None => name(field),
                },
                container: container.to_owned(),
            }),
        }
    }

    /// Takes a field from its owner: who removes a thing may set it anew.
    pub(crate) fn clear(&mut self, container: &str, field: Field, key: Option<&str>) {
        let Some(fields) = self.0.owners.get_mut(container) else { return };
        match key {
            Some(key) => {
                if let Some(of) = fields.compound.get_mut(&(field as i32)) {
                    of.owners.remove(key);
                }
            }
            None => {
                fields.simple.remove(&(field as i32));
            }
        }
    }

    /// Notes one of several owners of a field: hooks of all plugins are run.
    pub(crate) fn share(&mut self, container: &str, field: Field, plugin: &str) {
        let owner = self.0.owners.entry(container.to_owned()).or_default().simple.entry(field as i32).or_default();
        if !owner.is_empty() {
            owner.push(',');
        }
        owner.push_str(plugin);
    }

    /// As validators are told.
    pub(crate) fn message(&self) -> OwningPlugins {
        self.0.clone()
    }
}

/// A field as people are told it: `oom score adj`.
fn name(field: Field) -> String {
    let text = field.as_str_name();
    text.strip_prefix("FIELD_").unwrap_or(text).to_ascii_lowercase().replace('_', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_claim_names_both_plugins_unless_the_first_was_cleared() {
        let mut owners = Owners::default();
        owners.claim("c", Field::Env, Some("A"), "10-a").unwrap();
        owners.claim("c", Field::Env, Some("B"), "20-b").unwrap();
        owners.claim("d", Field::Env, Some("A"), "20-b").unwrap();
        let text = owners.claim("c", Field::Env, Some("A"), "20-b").unwrap_err().to_string();
        assert_eq!(text, "NRI plugins \"10-a\" and \"20-b\" both tried to set env \"A\" of container c");
        owners.clear("c", Field::Env, Some("A"));
        owners.claim("c", Field::Env, Some("A"), "30-c").unwrap();
        owners.claim("c", Field::OomScoreAdj, None, "10-a").unwrap();
        let text = owners.claim("c", Field::OomScoreAdj, None, "20-b").unwrap_err().to_string();
        assert!(text.contains("oom score adj"), "{text}");
    }
}
