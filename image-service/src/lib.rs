//! Images: references, registries, the content store and layers.
//!
//! Owns everything below `<root>/images`: what is pulled or imported, how it is verified and unpacked, and when it
//! is deleted. Knows no pod, no CRI and no mount: it hands out folder names ([`Rootfs`]) that others mount.

mod archive;
mod auth;
mod config;
mod digest;
mod error;
mod image;
mod manifest;
mod pull;
mod reference;
mod registry;
mod store;
mod unpack;

pub use auth::{AuthFields, Credentials};
pub use config::{Platform, RegistryConfig, StoreConfig};
pub use digest::Digest;
pub use error::{Error, ErrorKind};
pub use image::{FsUsage, Image, ImageConfig, ImageId, ImageUser, Rootfs};
pub use reference::Reference;
pub use store::{Hold, ImageStore, Problem, images_on_record};
