//! The kernel's Landlock version, for which nothing safe is to be had.
#![allow(unsafe_code, reason = "landlock_create_ruleset has no wrapper that only asks")]

use std::io;

/// `LANDLOCK_CREATE_RULESET_VERSION` of `linux/landlock.h`.
const VERSION: libc::c_uint = 1;

/// The ABI of the running kernel's Landlock.
pub(crate) fn landlock_abi() -> io::Result<u32> {
    // SAFETY: With this flag the kernel takes no attributes: a null pointer and no size. It makes nothing and touches no memory.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            VERSION,
        )
    };
    u32::try_from(answer).map_err(|_| io::Error::last_os_error())
}
