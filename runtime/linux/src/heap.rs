//! The C library's heap, for long-lived processes that were larger for a moment. Policy is the caller's.

/// Returns the free pages of the C library's heap to the kernel.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointers, locks for itself and never touches memory in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// At most so many arenas from now on (glibc's M_ARENA_MAX, mallopt(3)); those that exist stay. Other C libraries have one.
pub fn limit_arenas(most: i32) {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes no pointers and locks for itself.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, most);
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = most;
}
