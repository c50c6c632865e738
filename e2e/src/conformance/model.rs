//! The fields of the pod API, read from the API types themselves: a deserializer that hands every type all of its fields and
//! writes down what it was asked for. Knows no table and no scenario.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde::de::value::{BorrowedStrDeserializer, StrDeserializer};
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// A type's fields, each with the type of its value where that has fields too.
pub type Fields = BTreeMap<String, Option<String>>;

/// The types that are reachable from the ones asked for, by name.
#[derive(Debug, Default)]
pub struct Model {
    /// Every type with its fields.
    pub types: BTreeMap<String, Fields>,
}

impl Model {
    /// Adds a type and all its children.
    ///
    /// # Panics
    /// When a type asks for something that the explorer cannot give it: a new kind of field, which must be seen.
    pub fn add<T: DeserializeOwned>(&mut self) {
        let types = RefCell::new(std::mem::take(&mut self.types));
        explore::<T>(&types, false);
        self.types = types.into_inner();
    }

    /// All fields as `Type.field`.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.types.iter().flat_map(|(name, fields)| fields.keys().map(move |field| format!("{name}.{field}")))
    }

    /// The type of the value of `Type.field`, where it has fields.
    #[must_use]
    pub fn child(&self, name: &str) -> Option<&str> {
        let (parent, field) = name.split_once('.')?;
        self.types.get(parent)?.get(field)?.as_deref()
    }
}

/// A value of a type with a value in every field below it, for manifests that use one of them.
///
/// # Panics
/// As [`Model::add`].
#[must_use]
pub fn sample<T: DeserializeOwned + Serialize>() -> Value {
    serde_json::to_value(explore::<T>(&RefCell::default(), true)).expect("API types are JSON")
}

fn explore<T: DeserializeOwned>(types: &RefCell<BTreeMap<String, Fields>>, always: bool) -> T {
    let value = T::deserialize(Explorer { types, of: None, always });
    value.unwrap_or_else(|error| panic!("{}: {error}", std::any::type_name::<T>()))
}

#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl de::Error for Refused {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

/// Stands for a value of any type; `of` is the field that it is the value of.
#[derive(Clone, Copy)]
struct Explorer<'a> {
    types: &'a RefCell<BTreeMap<String, Fields>>,
    of: Option<(&'static str, &'static str)>,
    /// Whether types that are known already are visited again.
    always: bool,
}

/// A text that is a time, a quantity and a name.
const TEXT: &str = "1970-01-01T00:00:00Z";

macro_rules! yields {
    ($($method:ident => $visit:ident($($value:expr)?)),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
            visitor.$visit($($value)?)
        })*
    };
}

impl<'de> Deserializer<'de> for Explorer<'_> {
    type Error = Refused;

    yields! {
        deserialize_any => visit_str(TEXT),
        deserialize_bool => visit_bool(true),
        deserialize_i8 => visit_i8(1),
        deserialize_i16 => visit_i16(1),
        deserialize_i32 => visit_i32(1),
        deserialize_i64 => visit_i64(1),
        deserialize_u8 => visit_u8(1),
        deserialize_u16 => visit_u16(1),
        deserialize_u32 => visit_u32(1),
        deserialize_u64 => visit_u64(1),
        deserialize_f32 => visit_f32(1.0),
        deserialize_f64 => visit_f64(1.0),
        deserialize_str => visit_str(TEXT),
        deserialize_string => visit_str(TEXT),
        deserialize_identifier => visit_str(TEXT),
        deserialize_ignored_any => visit_unit(),
        deserialize_unit => visit_unit(),
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_seq(Once(Some(self)))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_map(Once(Some(self)))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        let mut types = self.types.borrow_mut();
        if let Some((parent, field)) = self.of {
            types.entry(parent.to_owned()).or_default().insert(field.to_owned(), Some(name.to_owned()));
        }
        // No type of a pod contains itself.
        let new = !types.contains_key(name);
        let known = types.entry(name.to_owned()).or_default();
        if new {
            known.extend(fields.iter().map(|field| ((*field).to_owned(), None)));
        }
        drop(types);
        let fields = if new || self.always { fields } else { &[] };
        visitor.visit_map(Each { explorer: self, name, fields })
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit_struct tuple tuple_struct enum
    }
}

/// A list or a map with one element.
struct Once<'a>(Option<Explorer<'a>>);

impl<'de> SeqAccess<'de> for Once<'_> {
    type Error = Refused;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Refused> {
        self.0.take().map(|explorer| seed.deserialize(explorer)).transpose()
    }
}

impl<'de> MapAccess<'de> for Once<'_> {
    type Error = Refused;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Refused> {
        if self.0.is_none() {
            return Ok(None);
        }
        seed.deserialize(StrDeserializer::new("key")).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Refused> {
        let explorer = self.0.take().ok_or_else(|| de::Error::custom("a value without a key"))?;
        seed.deserialize(explorer)
    }
}

/// A value with all fields of its type.
struct Each<'a> {
    explorer: Explorer<'a>,
    name: &'static str,
    fields: &'static [&'static str],
}

impl<'de> MapAccess<'de> for Each<'_> {
    type Error = Refused;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Refused> {
        let Some(field) = self.fields.first() else { return Ok(None) };
        seed.deserialize(BorrowedStrDeserializer::new(field)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Refused> {
        let (field, rest) = self.fields.split_first().ok_or_else(|| <Refused as de::Error>::custom("a value without a key"))?;
        self.fields = rest;
        seed.deserialize(Explorer { of: Some((self.name, field)), ..self.explorer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::PodSpec;

    #[test]
    fn every_type_below_a_pod_spec_is_found_with_its_fields() {
        let mut model = Model::default();
        model.add::<PodSpec>();
        assert_eq!(model.child("PodSpec.containers"), Some("Container"));
        assert_eq!(model.child("Container.livenessProbe"), Some("Probe"));
        assert_eq!(model.child("Container.startupProbe"), Some("Probe"));
        assert_eq!(model.child("Probe.httpGet"), Some("HTTPGetAction"));
        assert_eq!(model.child("HTTPGetAction.port"), None);
        assert!(model.names().any(|name| name == "HTTPHeader.value"));
        assert!(model.types["Volume"].len() > 25);
        assert!(model.types.contains_key("EphemeralContainer"));
    }

    #[test]
    fn a_sample_has_every_field() {
        let spec = sample::<PodSpec>();
        assert!(spec.pointer("/initContainers/0/startupProbe/httpGet/httpHeaders/0/name").is_some());
        assert!(spec.pointer("/volumes/0/rbd/secretRef/name").is_some());
    }
}
