//! Which devices there are, for people: nothing here carries data.

/// One address of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Of the device, from 1.
    pub port: u32,
    /// The GID as sixteen bytes. Of RoCE: the IP address of its interface, IPv4 mapped into IPv6.
    pub gid: [u8; 16],
    /// `InfiniBand`, `RoCE v1` or `RoCE v2`.
    pub kind: &'static str,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The name the kernel gives it.
    pub name: String,
    /// Why it cannot be used, or its addresses.
    pub addresses: Result<Vec<Address>, String>,
}

/// Every RDMA device the kernel has.
///
/// # Errors
/// When the kernel has no RDMA at all.
pub fn devices() -> std::io::Result<Vec<Found>> {
    let list = ibverbs::devices()?;
    Ok(list
        .iter()
        .map(|device| {
            let name = device.name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let addresses = device.open().map_err(|error| error.to_string()).map(|context| {
                context
                    .gid_table()
                    .iter()
                    .map(|entry| {
                        // The numbers of enum ibv_gid_type.
                        let kind = match entry.gid_type {
                            0 => "InfiniBand",
                            1 => "RoCE v1",
                            2 => "RoCE v2",
                            _ => "of an unknown kind",
                        };
                        let mut gid = [0; 16];
                        gid[..8].copy_from_slice(&entry.gid.subnet_prefix().to_be_bytes());
                        gid[8..].copy_from_slice(&entry.gid.interface_id().to_be_bytes());
                        Address { port: entry.port_num, gid, kind }
                    })
                    .collect()
            });
            Found { name, addresses }
        })
        .collect())
}

/// All devices in one line, for messages.
pub fn summary() -> String {
    match devices() {
        Err(error) => format!("none ({error})"),
        Ok(found) if found.is_empty() => "none".into(),
        Ok(found) => found.iter().map(Found::to_string).collect::<Vec<_>>().join("; "),
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.addresses {
            Err(reason) => write!(f, "{} ({reason})", self.name),
            Ok(addresses) => {
                let list: Vec<_> = addresses
                    .iter()
                    .map(|address| {
                        let gid = std::net::Ipv6Addr::from(address.gid);
                        let shown = gid.to_ipv4_mapped().map_or_else(|| gid.to_string(), |four| four.to_string());
                        format!("{shown} port {} {}", address.port, address.kind)
                    })
                    .collect();
                write!(f, "{} ({})", self.name, list.join(", "))
            }
        }
    }
}
