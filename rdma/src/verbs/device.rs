//! An opened device, the port we use of it, and the protection domain in which everything of ours lives.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;

use rdma_sys::*;

use super::connection_manager::{EventChannel, Identifier};
use super::discovery;

/// Why there is no device to work with. Each says what to do.
#[derive(thiserror::Error, Debug)]
pub enum DeviceError {
    /// The kernel's connection manager is not there, or this process may not use it.
    #[error(
        "cannot open the RDMA connection manager: {0}; load the module rdma_ucm, and see that /dev/infiniband/rdma_cm \
         exists and may be opened (containers need it passed in)"
    )]
    ConnectionManager(io::Error),
    /// The address belongs to no RDMA device.
    #[error(
        "no RDMA device serves {address} ({source}); devices here: {found}; give this node an address of an RDMA \
         interface, or make a software device: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev INTERFACE"
    )]
    NoDevice { address: SocketAddr, source: io::Error, found: String },
    /// An address of every interface names no device.
    #[error("{0} names no single interface: give this node the address of its RDMA interface")]
    AnyAddress(SocketAddr),
    /// The device is there and cannot be used.
    #[error("cannot {action} RDMA device {device}: {source}")]
    Unusable { device: String, action: &'static str, source: io::Error },
}

/// What the device can do, as it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Work requests in one queue.
    pub queue_depth: u32,
    /// Entries in one completion queue.
    pub completions: u32,
    /// Reads and atomics of ours under way on one queue pair.
    pub reads_initiated: u8,
    /// Reads and atomics of a peer under way on one queue pair.
    pub reads_served: u8,
    /// Whether it has compare-and-swap and fetch-and-add.
    pub atomics: bool,
    /// Bytes of the longest operation.
    pub operation_length: u32,
    /// Bytes of the largest packet on the port.
    pub mtu: u32,
}

/// Something the device tells of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsynchronousEvent {
    /// The queue pair (its address identifies it) can go on no more.
    QueuePairFatal(usize),
    /// The peer of that queue pair named a wrong key or range, or asked for what is not served.
    QueuePairViolated(usize),
    /// A queue pair that waits to be established has had a first packet.
    Established(usize),
    /// The port is up again.
    PortActive(u8),
    /// The port is down: operations will time out.
    PortDown(u8),
    /// Nothing on this device will work any more.
    DeviceFatal,
    /// Of no concern to us: the number the kernel gives it.
    Other(u32),
}

/// An opened device. Everything made on it holds it by an [`Arc`], so it is closed last.
pub struct Device {
    context: *mut ibv_context,
    name: String,
    port: u8,
    limits: Limits,
}

// SAFETY: libibverbs locks inside; every object on a context may be used from any thread, and the context itself is only read.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// The least of a device's numbers, which are signed for no reason.
fn at_least_zero(number: libc::c_int) -> u32 {
    number.max(0) as u32
}

/// The error of a call that returns its error number.
pub(super) fn check(number: libc::c_int) -> io::Result<()> {
    match number {
        0 => Ok(()),
        // Some calls of librdmacm return -1 and set errno, those of libibverbs return the number.
        -1 => Err(io::Error::last_os_error()),
        number => Err(io::Error::from_raw_os_error(number.abs())),
    }
}

/// Sets a descriptor to return instead of waiting.
pub(super) fn set_nonblocking(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    let flags = crate::shm::socket::check(unsafe { libc::fcntl(descriptor, libc::F_GETFL) })?;
    // SAFETY: as above.
    crate::shm::socket::check(unsafe { libc::fcntl(descriptor, libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

impl Device {
    /// Opens the device and port that `address` belongs to. Its port number does not matter.
    ///
    /// # Errors
    /// [`DeviceError`], which says what to do.
    pub fn for_address(address: SocketAddr) -> Result<Arc<Device>, DeviceError> {
        if address.ip().is_unspecified() {
            return Err(DeviceError::AnyAddress(address));
        }
        let channel = EventChannel::new().map_err(DeviceError::ConnectionManager)?;
        let found = Identifier::new(&channel)
            .and_then(|mut identifier| {
                identifier.bind(SocketAddr::new(address.ip(), 0))?;
                identifier.device_and_port().ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
            })
            .map_err(|source| DeviceError::NoDevice { address, source, found: discovery::summary() })?;
        Self::open(&found.0, found.1)
    }

    fn open(name: &str, port: u8) -> Result<Arc<Device>, DeviceError> {
        let unusable = |action, source| DeviceError::Unusable { device: name.to_string(), action, source };
        // Kernels before 5.12 need to be told before the first registration that this process may fork. Later ones
        // copy pinned pages on fork; there the call changes nothing. Failing means "too late", which later opens are.
        // SAFETY: no arguments; thread-safe.
        let _ = unsafe { ibv_fork_init() };
        let mut count = 0;
        // SAFETY: the list is freed below, after the device is opened: a context keeps its device.
        let list = unsafe { ibv_get_device_list(&mut count) };
        if list.is_null() {
            return Err(unusable("list", io::Error::last_os_error()));
        }
        let mut context = std::ptr::null_mut();
        for index in 0..at_least_zero(count) as usize {
            // SAFETY: the list has `count` entries, each a live device with a name that ends in zero.
            unsafe {
                let device = *list.add(index);
                if CStr::from_ptr(ibv_get_device_name(device)).to_bytes() == name.as_bytes() {
                    context = ibv_open_device(device);
                    break;
                }
            }
        }
        let error = io::Error::last_os_error();
        // SAFETY: the list came from `ibv_get_device_list` and is not used after this.
        unsafe { ibv_free_device_list(list) };
        if context.is_null() {
            return Err(unusable("open", error));
        }
        let limits = Limits {
            queue_depth: 0,
            completions: 0,
            reads_initiated: 0,
            reads_served: 0,
            atomics: false,
            operation_length: 0,
            mtu: 0,
        };
        // From here on dropping it closes the context.
        let mut device = Device { context, name: name.to_string(), port, limits };
        device.limits = device.query().map_err(|source| unusable("query", source))?;
        // SAFETY: the context is open.
        set_nonblocking(unsafe { (*context).async_fd }).map_err(|source| unusable("watch", source))?;
        Ok(Arc::new(device))
    }

    fn query(&self) -> io::Result<Limits> {
        let mut device = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: the context is open and `device` has room for the answer.
        check(unsafe { ibv_query_device(self.context, device.as_mut_ptr()) })?;
        // SAFETY: zeroed, then filled: all its fields are plain numbers.
        let device = unsafe { device.assume_init() };
        let port = self.query_port()?;
        if port.state != ibv_port_state::IBV_PORT_ACTIVE {
            // Not an error: it may come up later, and connecting says so if it does not.
            tracing::warn!(device = self.name, port = self.port, state = port.state, "the RDMA port is not active");
        }
        let byte = |number: libc::c_int| at_least_zero(number).min(255) as u8;
        Ok(Limits {
            queue_depth: at_least_zero(device.max_qp_wr),
            completions: at_least_zero(device.max_cqe),
            reads_initiated: byte(device.max_qp_init_rd_atom),
            reads_served: byte(device.max_qp_rd_atom),
            atomics: device.atomic_cap != ibv_atomic_cap::IBV_ATOMIC_NONE,
            operation_length: port.max_msg_sz,
            mtu: 128 << port.active_mtu,
        })
    }

    fn query_port(&self) -> io::Result<ibv_port_attr> {
        let mut port = MaybeUninit::<ibv_port_attr>::zeroed();
        // SAFETY: the context is open and `port` has room for the answer.
        check(unsafe { ___ibv_query_port(self.context, self.port, port.as_mut_ptr()) })?;
        // SAFETY: zeroed, then filled: all its fields are plain numbers.
        Ok(unsafe { port.assume_init() })
    }

    /// Whether our port can send, as the device says now. A system call.
    pub fn port_is_active(&self) -> bool {
        self.query_port().is_ok_and(|port| port.state == ibv_port_state::IBV_PORT_ACTIVE)
    }

    /// The name the kernel gives it, such as `mlx5_0` or `rxe0`.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Number of its port, from 1.
    pub fn port(&self) -> u8 {
        self.port
    }
    /// What it can do.
    pub fn limits(&self) -> Limits {
        self.limits
    }
    pub(super) fn context(&self) -> *mut ibv_context {
        self.context
    }

    /// Readable when [`Device::next_event`] has something.
    pub fn event_descriptor(&self) -> RawFd {
        // SAFETY: the context is open as long as `self`.
        unsafe { (*self.context).async_fd }
    }

    /// What the device tells of its own accord, if anything waits. Never blocks.
    pub fn next_event(&self) -> Option<AsynchronousEvent> {
        let mut event = MaybeUninit::<ibv_async_event>::zeroed();
        // SAFETY: the context is open and `event` has room.
        if unsafe { ibv_get_async_event(self.context, event.as_mut_ptr()) } != 0 {
            return None;
        }
        let pointer = event.as_mut_ptr();
        // The kernel may know kinds that the Rust enumeration does not: read as a number, never as the enumeration.
        // SAFETY: filled by the call above; the union holds a pointer or a number, both plain; the event is acknowledged once.
        let (kind, pair, port) = unsafe {
            let kind = (&raw const (*pointer).event_type).cast::<u32>().read();
            let pair = (&raw const (*pointer).element.qp).read() as usize;
            let port = (&raw const (*pointer).element.port_num).read() as u8;
            ibv_ack_async_event(pointer);
            (kind, pair, port)
        };
        let is = |known: ibv_event_type| kind == known as u32;
        Some(if is(ibv_event_type::IBV_EVENT_QP_FATAL) {
            AsynchronousEvent::QueuePairFatal(pair)
        } else if is(ibv_event_type::IBV_EVENT_QP_REQ_ERR) || is(ibv_event_type::IBV_EVENT_QP_ACCESS_ERR) {
            AsynchronousEvent::QueuePairViolated(pair)
        } else if is(ibv_event_type::IBV_EVENT_COMM_EST) {
            AsynchronousEvent::Established(pair)
        } else if is(ibv_event_type::IBV_EVENT_PORT_ACTIVE) {
            AsynchronousEvent::PortActive(port)
        } else if is(ibv_event_type::IBV_EVENT_PORT_ERR) {
            AsynchronousEvent::PortDown(port)
        } else if is(ibv_event_type::IBV_EVENT_DEVICE_FATAL) {
            AsynchronousEvent::DeviceFatal
        } else {
            AsynchronousEvent::Other(kind)
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: whatever was made on the context holds this device, so nothing of it is left.
        if unsafe { ibv_close_device(self.context) } != 0 {
            tracing::error!(device = self.name, error = %io::Error::last_os_error(), "cannot close the device");
        }
    }
}

/// The domain in which our queue pairs may reach our regions, and nobody else's.
pub struct ProtectionDomain {
    domain: *mut ibv_pd,
    device: Arc<Device>,
}

// SAFETY: libibverbs allows use from any thread.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// # Errors
    /// What the device says.
    pub fn new(device: &Arc<Device>) -> io::Result<Arc<ProtectionDomain>> {
        // SAFETY: the context is open as long as the device, which the domain holds.
        let domain = unsafe { ibv_alloc_pd(device.context()) };
        if domain.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Arc::new(ProtectionDomain { domain, device: device.clone() }))
    }
    /// The device it is of.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
    pub(super) fn as_ptr(&self) -> *mut ibv_pd {
        self.domain
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs hold the domain, so none is left.
        if unsafe { ibv_dealloc_pd(self.domain) } != 0 {
            tracing::error!(device = self.device.name(), "cannot free a protection domain");
        }
    }
}
