//! The guest's interfaces: loopback, and the one that the `ip=` boot argument describes.
//!
//! By the old ioctls: three calls per interface, no netlink messages to build. Not here: resolvers, which come with
//! `/init`.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::sys::{self, InterfaceName};

/// The part of `ip=<client>:<server>:<gateway>:<netmask>:<hostname>:<device>:<autoconf>` that is used here.
/// Source: Documentation/admin-guide/nfs/nfsroot.rst of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BootAddress {
    pub(crate) client: Ipv4Addr,
    pub(crate) gateway: Option<Ipv4Addr>,
    pub(crate) netmask: Ipv4Addr,
    pub(crate) hostname: Option<String>,
    pub(crate) device: String,
}

/// Why the network is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetError {
    #[error("the boot argument ip={0} is malformed")]
    Argument(String),
    #[error("{0:?} is not the name of an interface")]
    Name(String),
    #[error("{step} of {device}")]
    Kernel {
        step: &'static str,
        device: String,
        source: io::Error,
    },
}

impl BootAddress {
    /// Reads the `ip=` argument of a kernel command line. `None`: there is none.
    ///
    /// # Errors
    /// There is one that does not say address, netmask and device.
    pub(crate) fn from_cmdline(cmdline: &str) -> Result<Option<Self>, NetError> {
        let Some(argument) = cmdline.split_whitespace().find_map(|word| word.strip_prefix("ip=")) else {
            return Ok(None);
        };
        Self::parse(argument)
            .map(Some)
            .ok_or_else(|| NetError::Argument(argument.to_owned()))
    }

    fn parse(argument: &str) -> Option<Self> {
        let fields: Vec<&str> = argument.split(':').collect();
        let field = |index: usize| fields.get(index).copied().filter(|text| !text.is_empty());
        let address = |index: usize| field(index).map(|text| text.parse::<Ipv4Addr>().ok());
        Some(Self {
            client: address(0)??,
            gateway: match address(2) {
                Some(parsed) => Some(parsed?),
                None => None,
            },
            netmask: address(3)??,
            hostname: field(4).map(str::to_owned),
            device: field(5)?.to_owned(),
        })
    }
}

/// Brings loopback up; the kernel gives it its address.
pub(crate) fn bring_up_loopback() -> Result<(), NetError> {
    let lo = InterfaceName::new("lo").expect("lo is a name");
    let up = |socket: &std::os::fd::OwnedFd| sys::set_up(socket.as_fd(), &lo);
    inet_socket()
        .and_then(|socket| up(&socket))
        .map_err(kernel("bringing up", "lo"))
}

/// Gives the interface its address and the default route. Repeating it changes nothing.
pub(crate) fn bring_up(address: &BootAddress) -> Result<(), NetError> {
    let device = address.device.as_str();
    let name = InterfaceName::new(device).ok_or_else(|| NetError::Name(device.to_owned()))?;
    let socket = inet_socket().map_err(kernel("a socket for the set-up", device))?;
    sys::set_address(socket.as_fd(), &name, address.client).map_err(kernel("setting the address", device))?;
    sys::set_netmask(socket.as_fd(), &name, address.netmask).map_err(kernel("setting the netmask", device))?;
    sys::set_up(socket.as_fd(), &name).map_err(kernel("bringing up", device))?;
    match address
        .gateway
        .map(|gateway| sys::add_default_route(socket.as_fd(), gateway))
    {
        None | Some(Ok(())) => Ok(()),
        Some(Err(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        Some(Err(error)) => Err(kernel("adding the default route", device)(error)),
    }
}

fn inet_socket() -> io::Result<std::os::fd::OwnedFd> {
    Ok(socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

fn kernel(step: &'static str, device: &str) -> impl FnOnce(io::Error) -> NetError {
    let device = device.to_owned();
    move |source| NetError::Kernel { step, device, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_that_the_host_passes_is_understood() {
        let cmdline = "console=ttyS0 ip=169.254.0.21::169.254.0.22:255.255.255.252::eth0:off quiet\n";
        let expected = BootAddress {
            client: Ipv4Addr::new(169, 254, 0, 21),
            gateway: Some(Ipv4Addr::new(169, 254, 0, 22)),
            netmask: Ipv4Addr::new(255, 255, 255, 252),
            hostname: None,
            device: "eth0".to_owned(),
        };
        assert_eq!(BootAddress::from_cmdline(cmdline).unwrap(), Some(expected));
        assert_eq!(BootAddress::from_cmdline("quiet").unwrap(), None);
    }

    #[test]
    fn gateway_and_hostname_are_optional_and_the_rest_is_not() {
        let parsed = BootAddress::parse("10.0.0.2:::255.255.255.0:box:eth1").unwrap();
        assert_eq!((parsed.gateway, parsed.hostname.as_deref()), (None, Some("box")));
        for bad in [
            "dhcp",
            "",
            ":::",
            "10.0.0.2::x:255.0.0.0::eth0",
            "10.0.0.2:::::eth0",
            "10.0.0.2:::255.0.0.0::",
        ] {
            assert!(BootAddress::from_cmdline(&format!("ip={bad}")).is_err(), "{bad:?}");
        }
    }
}
