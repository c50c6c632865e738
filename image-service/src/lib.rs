//! Images: references, registries, the content store and layers
