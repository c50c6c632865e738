//! Giving memory back: for small long-lived processes that were larger for a moment.

/// Returns the free pages of the C library's heap to the kernel.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers, locks for itself and never touches memory in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
