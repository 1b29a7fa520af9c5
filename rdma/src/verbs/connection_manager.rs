//! The connection manager (librdmacm): addresses become paths, and queue pairs are told of each other.
//!
//! We make and change our queue pairs ourselves; an [`Identifier`] only says with which [`Attributes`].

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;

use rdma_sys::*;

use super::device::{check, set_nonblocking};

/// Connections that may wait to be looked at.
const BACKLOG: libc::c_int = 128;
/// Bytes of ours in a request, and so of everything a request may say.
pub const REQUEST_DATA_MAXIMUM: usize = 56;
/// Bytes of ours in an answer that we use; more would fit.
pub const REPLY_DATA_MAXIMUM: usize = 64;

/// What to change a queue pair to.
pub struct Attributes {
    pub(super) attributes: ibv_qp_attr,
    pub(super) mask: libc::c_int,
}

impl Attributes {
    pub(super) fn zeroed() -> Attributes {
        // SAFETY: all fields are plain numbers.
        Attributes { attributes: unsafe { MaybeUninit::zeroed().assume_init() }, mask: 0 }
    }
}

/// States a queue pair is led through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    Initialized,
    ReadyToReceive,
    ReadyToSend,
}

/// What both sides tell each other about their queue pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    pub queue_pair: u32,
    /// Reads and atomics of the peer we serve at a time.
    pub reads_served: u8,
    /// Reads and atomics of ours at a time.
    pub reads_initiated: u8,
}

/// What has happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    AddressResolved,
    RouteResolved,
    /// A peer wants to connect. Its identifier comes with the event.
    Request,
    /// The peer takes the connection; it waits for us to say `establish`.
    Response,
    Established,
    /// The peer will not have it.
    Rejected,
    /// The peer does not answer.
    Unreachable,
    Disconnected,
    /// Nothing of the old connection is under way any more.
    Forgotten,
    DeviceRemoved,
    /// It failed, as the status says.
    Failed,
    Other,
}

/// One event, its contents copied.
pub struct Event {
    pub kind: Kind,
    /// Of which identifier: [`Identifier::identity`].
    pub identity: usize,
    pub status: i32,
    /// What the peer says. May be longer than what it wrote: the rest is zero.
    pub data: Vec<u8>,
    /// What the peer offers, as seen from us.
    pub reads_served: u8,
    pub reads_initiated: u8,
    /// With [`Kind::Request`].
    pub requester: Option<Identifier>,
}

/// Where events arrive.
pub struct EventChannel {
    channel: *mut rdma_event_channel,
}

// SAFETY: librdmacm allows use from any thread.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    /// # Errors
    /// When the kernel's connection manager is not there or may not be used.
    pub fn new() -> io::Result<Arc<EventChannel>> {
        // SAFETY: no arguments.
        let channel = unsafe { rdma_create_event_channel() };
        if channel.is_null() {
            return Err(io::Error::last_os_error());
        }
        let channel = EventChannel { channel };
        set_nonblocking(channel.descriptor())?;
        Ok(Arc::new(channel))
    }

    /// Readable when [`EventChannel::next`] has something.
    pub fn descriptor(&self) -> RawFd {
        // SAFETY: alive as long as `self`.
        unsafe { (*self.channel).fd }
    }

    /// The next event, if one waits. Never blocks.
    pub fn next(self: &Arc<Self>) -> Option<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the channel is alive and `event` has room.
        if unsafe { rdma_get_cm_event(self.channel, &mut event) } != 0 {
            return None;
        }
        // SAFETY: the event is ours until it is acknowledged, once, at the end. Only connected queue pairs are used here,
        // so the union holds the parameters of a connection, and its data are as long as it says.
        unsafe {
            let event_ref = &*event;
            let kind = match event_ref.event {
                rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED => Kind::AddressResolved,
                rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED => Kind::RouteResolved,
                rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST => Kind::Request,
                rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_RESPONSE => Kind::Response,
                rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED => Kind::Established,
                rdma_cm_event_type::RDMA_CM_EVENT_REJECTED => Kind::Rejected,
                rdma_cm_event_type::RDMA_CM_EVENT_UNREACHABLE => Kind::Unreachable,
                rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED => Kind::Disconnected,
                rdma_cm_event_type::RDMA_CM_EVENT_TIMEWAIT_EXIT => Kind::Forgotten,
                rdma_cm_event_type::RDMA_CM_EVENT_DEVICE_REMOVAL => Kind::DeviceRemoved,
                rdma_cm_event_type::RDMA_CM_EVENT_ADDR_ERROR
                | rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_ERROR
                | rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_ERROR => Kind::Failed,
                _ => Kind::Other,
            };
            let parameters = &event_ref.param.conn;
            let data = if parameters.private_data.is_null() {
                Vec::new()
            } else {
                let bytes = parameters.private_data.cast::<u8>();
                std::slice::from_raw_parts(bytes, usize::from(parameters.private_data_len)).to_vec()
            };
            let copy = Event {
                kind,
                identity: event_ref.id as usize,
                status: event_ref.status,
                data,
                reads_served: parameters.responder_resources,
                reads_initiated: parameters.initiator_depth,
                requester: (kind == Kind::Request)
                    .then(|| Identifier { identifier: event_ref.id, _channel: self.clone() }),
            };
            rdma_ack_cm_event(event);
            Some(copy)
        }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: identifiers hold the channel, so none is left.
        unsafe { rdma_destroy_event_channel(self.channel) };
    }
}

/// One end of a connection, or a listener.
pub struct Identifier {
    identifier: *mut rdma_cm_id,
    _channel: Arc<EventChannel>,
}

// SAFETY: librdmacm allows use from any thread.
unsafe impl Send for Identifier {}

/// An address as the system wants it.
fn system_address(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: all zero is a valid address of no family.
    let mut storage: libc::sockaddr_storage = unsafe { MaybeUninit::zeroed().assume_init() };
    match address {
        SocketAddr::V4(four) => {
            let system = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: four.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(four.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage has room and alignment for every kind of address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(system) };
        }
        SocketAddr::V6(six) => {
            let system = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: six.port().to_be(),
                sin6_flowinfo: six.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: six.ip().octets() },
                sin6_scope_id: six.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(system) };
        }
    }
    storage
}

const _: () = assert!(size_of::<libc::sockaddr_in6>() <= size_of::<libc::sockaddr_storage>());

impl Identifier {
    /// # Errors
    /// What the connection manager says.
    pub fn new(channel: &Arc<EventChannel>) -> io::Result<Identifier> {
        let mut identifier = std::ptr::null_mut();
        // SAFETY: the channel is alive, and the identifier will hold it.
        check(unsafe {
            rdma_create_id(channel.channel, &mut identifier, std::ptr::null_mut(), rdma_port_space::RDMA_PS_TCP)
        })?;
        Ok(Identifier { identifier, _channel: channel.clone() })
    }

    /// What events name it by.
    pub fn identity(&self) -> usize {
        self.identifier as usize
    }

    /// # Errors
    /// `ENODEV` or `EADDRNOTAVAIL` when no RDMA device has the address.
    pub fn bind(&mut self, address: SocketAddr) -> io::Result<()> {
        let mut address = system_address(address);
        // SAFETY: the address is valid for the call.
        check(unsafe { rdma_bind_addr(self.identifier, (&raw mut address).cast()) })
    }

    /// Name and port of the device it is bound to.
    pub fn device_and_port(&self) -> Option<(String, u8)> {
        // SAFETY: alive as long as `self`; a context it is bound to has a device with a name.
        unsafe {
            let context = (*self.identifier).verbs;
            if context.is_null() {
                return None;
            }
            let name = std::ffi::CStr::from_ptr(ibv_get_device_name((*context).device));
            Some((name.to_string_lossy().into_owned(), (*self.identifier).port_num))
        }
    }

    /// Requests arrive as events from now on.
    ///
    /// # Errors
    /// `EADDRINUSE` when somebody listens there.
    pub fn listen(&mut self) -> io::Result<()> {
        // SAFETY: alive.
        check(unsafe { rdma_listen(self.identifier, BACKLOG) })
    }

    /// [`Kind::AddressResolved`] or [`Kind::Failed`] follows.
    ///
    /// # Errors
    /// What the connection manager says at once.
    pub fn resolve_address(&mut self, source: SocketAddr, target: SocketAddr, milliseconds: u32) -> io::Result<()> {
        let mut source = system_address(SocketAddr::new(source.ip(), 0));
        let mut target = system_address(target);
        // SAFETY: both addresses are valid for the call.
        check(unsafe {
            rdma_resolve_addr(
                self.identifier,
                (&raw mut source).cast(),
                (&raw mut target).cast(),
                milliseconds as libc::c_int,
            )
        })
    }

    /// [`Kind::RouteResolved`] or [`Kind::Failed`] follows.
    ///
    /// # Errors
    /// What the connection manager says at once.
    pub fn resolve_route(&mut self, milliseconds: u32) -> io::Result<()> {
        // SAFETY: alive.
        check(unsafe { rdma_resolve_route(self.identifier, milliseconds as libc::c_int) })
    }

    /// How to bring a queue pair into `state` for this connection.
    ///
    /// # Errors
    /// What the connection manager says.
    pub fn attributes(&self, state: State) -> io::Result<Attributes> {
        let mut attributes = Attributes::zeroed();
        attributes.attributes.qp_state = match state {
            State::Initialized => ibv_qp_state::IBV_QPS_INIT,
            State::ReadyToReceive => ibv_qp_state::IBV_QPS_RTR,
            State::ReadyToSend => ibv_qp_state::IBV_QPS_RTS,
        };
        // SAFETY: alive; both pointers have room.
        check(unsafe { rdma_init_qp_attr(self.identifier, &mut attributes.attributes, &mut attributes.mask) })?;
        Ok(attributes)
    }

    fn parameters(ours: Parameters, data: &[u8]) -> rdma_conn_param {
        rdma_conn_param {
            private_data: data.as_ptr().cast(),
            private_data_len: data.len() as u8,
            responder_resources: ours.reads_served,
            initiator_depth: ours.reads_initiated,
            flow_control: 1,
            retry_count: 6,
            rnr_retry_count: 6,
            srq: 0,
            qp_num: ours.queue_pair,
        }
    }

    /// Asks the peer for a connection. [`Kind::Response`], [`Kind::Rejected`] or [`Kind::Unreachable`] follows.
    ///
    /// # Errors
    /// What the connection manager says at once.
    pub fn connect(&mut self, ours: Parameters, data: &[u8]) -> io::Result<()> {
        assert!(data.len() <= REQUEST_DATA_MAXIMUM, "a request has no room for that");
        let mut parameters = Self::parameters(ours, data);
        // SAFETY: parameters and data are valid for the call.
        check(unsafe { rdma_connect(self.identifier, &mut parameters) })
    }

    /// Takes a request. [`Kind::Established`] follows.
    ///
    /// # Errors
    /// What the connection manager says at once.
    pub fn accept(&mut self, ours: Parameters, data: &[u8]) -> io::Result<()> {
        assert!(data.len() <= REPLY_DATA_MAXIMUM, "an answer has no room for that");
        let mut parameters = Self::parameters(ours, data);
        // SAFETY: parameters and data are valid for the call.
        check(unsafe { rdma_accept(self.identifier, &mut parameters) })
    }

    /// Turns a request down, with a reason.
    pub fn reject(&mut self, reason: u8) {
        let data = [reason];
        // SAFETY: the data are valid for the call. Should it fail, the requester hears nothing and gives up in time.
        unsafe { rdma_reject(self.identifier, data.as_ptr().cast(), data.len() as u8) };
    }

    /// Confirms [`Kind::Response`]: the peer may go on.
    ///
    /// # Errors
    /// What the connection manager says.
    pub fn establish(&mut self) -> io::Result<()> {
        // SAFETY: alive.
        check(unsafe { rdma_establish(self.identifier) })
    }

    /// Tells the connection manager that a first packet has come, which says as much as the peer's confirmation.
    pub fn notify_established(&mut self) {
        // SAFETY: alive. Should it fail, the confirmation itself is still to come.
        unsafe { rdma_notify(self.identifier, ibv_event_type::IBV_EVENT_COMM_EST) };
    }

    /// Says good-bye to the peer.
    pub fn disconnect(&mut self) {
        // SAFETY: alive. It fails where there is no connection, which is what we want.
        unsafe { rdma_disconnect(self.identifier) };
    }
}

impl Drop for Identifier {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; every event of it was acknowledged where it was taken.
        if unsafe { rdma_destroy_id(self.identifier) } != 0 {
            tracing::error!(error = %io::Error::last_os_error(), "cannot destroy a connection identifier");
        }
    }
}
