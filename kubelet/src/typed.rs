//! The API's types from and to JSON. All of them go through one tree and one reader: every further pair of a type and a
//! format is compiled anew, and the 180 types below a Pod are a tenth of this crate's code each time.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads `value` as a `T`; the error knows the path of the field that is wrong.
pub(crate) fn read<T: DeserializeOwned>(value: &Value) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    serde_path_to_error::deserialize(value)
}

/// Reads JSON text as a `T`.
pub(crate) fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    read(&serde_json::from_slice(bytes)?).map_err(serde_path_to_error::Error::into_inner)
}

/// The JSON text of `object`.
pub(crate) fn to_bytes<T: Serialize>(object: &T) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&serde_json::to_value(object)?)
}
