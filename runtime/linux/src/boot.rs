//! Which boot this is.

use crate::{Error, Result};

const PATH: &str = "/proc/sys/kernel/random/boot_id";

/// The random id that the kernel chose at this boot.
pub fn boot_id() -> Result<String> {
    let text = std::fs::read_to_string(PATH).map_err(|source| Error::Read { subject: PATH.to_owned(), source })?;
    Ok(text.trim().to_owned())
}
