//! The checksum of the upstream's checkpoint files: FNV-1a, 32 bits, of how Go's spew prints the structure. With it a file of ours
//! can be taken over by the upstream's kubelet, and one of its by us.

/// FNV-1a with 32 bits, as Go's `fnv.New32a`.
pub(crate) fn fnv32a(text: &str) -> u64 {
    let mut hash = 0x811c_9dc5_u32;
    for byte in text.bytes() {
        hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    u64::from(hash)
}

/// A Go slice as spew prints it: `[a b]`.
pub(crate) fn slice<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    format!("[{}]", items.join(" "))
}

/// A Go map as spew prints it, its keys in their order: `map[a:1 b:2]`.
pub(crate) fn map<K: ToString, V: ToString>(entries: impl IntoIterator<Item = (K, V)>) -> String {
    format!("map{}", slice(entries.into_iter().map(|(key, value)| format!("{}:{}", key.to_string(), value.to_string()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_published_one() {
        assert_eq!((fnv32a(""), fnv32a("a"), fnv32a("foobar")), (0x811c_9dc5, 0xe40c_292c, 0xbf9c_f968));
    }
}
