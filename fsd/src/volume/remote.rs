//! Requests, replies, and what comes from the fabric.
//!
//! A request to this node itself is served directly. A reply that does not come because its peer is gone
//! ends with EIO after the peer time-out; a connection that only broke is made again, and its session loses nothing.

use super::*;
use crate::metrics::Direction;

pub(crate) struct Call {
    slot: Slot,
    since: Instant,
    sender: Sender<std::result::Result<Reply, i32>>,
}

impl Volume {
    /// Asks a node and waits for its reply.
    ///
    /// # Errors
    /// What the node answers; EIO when it is unreachable for the peer time-out; EINVAL for a slot that is no member.
    pub(crate) async fn call(self: &Rc<Self>, slot: Slot, request: Request) -> Result<Reply> {
        if slot == self.slot() {
            let future: std::pin::Pin<Box<dyn Future<Output = Result<Reply>>>> =
                Box::pin(self.clone().serve(self.options.me, request));
            return future.await;
        }
        if !self.options.members.contains(&slot) {
            return Err(Errno::EINVAL);
        }
        self.wait_for_peer(slot).await?;
        let id = self.number();
        let (sender, receiver) = oneshot();
        self.calls.borrow_mut().insert(id, Call { slot, since: Instant::now(), sender });
        self.send(slot, Message::Request { id, request });
        match receiver.await {
            Some(Ok(reply)) => Ok(reply),
            Some(Err(errno)) => Err(Errno::from_peer(errno)),
            None => Err(Errno::EIO),
        }
    }

    /// Waits for a peer that is not there, up to the peer time-out.
    async fn wait_for_peer(self: &Rc<Self>, slot: Slot) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.peers.borrow().get(&slot) {
                Some(peer) if peer.node.is_some() => return Ok(()),
                Some(_) => {}
                None => return Err(Errno::EINVAL),
            }
            if began.elapsed() >= self.options.peer_timeout {
                return Err(Errno::EIO);
            }
            // Peers come rarely: a look every so often is enough, and bounds the wait.
            self.executor.sleep(Duration::from_millis(50)).await;
        }
    }

    /// Sends a message; to this node itself through its own inbox.
    pub(crate) fn send(self: &Rc<Self>, to: Slot, message: Message) {
        if to == self.slot() {
            self.inbox.borrow_mut().push_back(message);
            return;
        }
        let lane = message.lane();
        tracing::trace!(to, ?message, "sends");
        let source = header::Source {
            slot: self.slot(),
            node_incarnation: self.options.me.incarnation,
            daemon_incarnation: self.options.daemon_incarnation,
            view: 1,
        };
        let record = message.record(source);
        debug_assert_eq!(
            Message::from_record(&record).map_err(|error| error.to_string()),
            Ok((source, message.clone()))
        );
        self.metrics.messages_sent[metric_lane(lane)].increment();
        self.metrics.message_bytes[Direction::Sent].add(record.len() as u64);
        let sent = match self.transport.borrow_mut().as_mut() {
            Some(transport) => transport.send(to, lane, &record),
            None => Err("this node has no fabric".to_string()),
        };
        if let Err(error) = sent {
            tracing::debug!(to, %error, "a message was not sent; its session is gone");
            match message {
                Message::Request { id, .. } => drop(self.calls.borrow_mut().remove(&id)),
                // Whoever waits for it shall not wait for ever: the lane may still take this.
                Message::Reply { id, reply: Ok(_) } => self.send(to, Message::Reply { id, reply: Err(libc::EIO) }),
                _ => {}
            }
        }
    }

    /// A peer broke the protocol: it loses its connection, this daemon goes on.
    pub(crate) fn refuse(&self, slot: Slot, reason: &str) {
        if slot == self.slot() {
            tracing::error!(reason, "this node breaks its own protocol");
            return;
        }
        tracing::warn!(slot, reason, "refused a peer's message and dropped its connection");
        self.metrics.messages_invalid.increment();
        if let Some(transport) = self.transport.borrow_mut().as_mut() {
            transport.refuse(slot, reason);
        }
    }

    /// Takes in everything the fabric has.
    pub fn poll_transport(self: &Rc<Self>) -> bool {
        let mut events = Vec::new();
        if let Some(transport) = self.transport.borrow_mut().as_mut() {
            transport.poll(&mut events);
        }
        let any = !events.is_empty();
        for event in events {
            self.transport_event(event);
        }
        any
    }

    fn transport_event(self: &Rc<Self>, event: TransportEvent) {
        match event {
            TransportEvent::Message { slot, record } => match Message::from_record(&record) {
                Ok((source, message)) => {
                    self.metrics.message_bytes[Direction::Received].add(record.len() as u64);
                    let node = self.peers.borrow().get(&slot).and_then(|peer| peer.node);
                    if source.slot != slot || Some(source.node_incarnation) != node.map(|node| node.incarnation) {
                        self.refuse(slot, "a message under another node's name");
                        return;
                    }
                    self.metrics.messages_received[metric_lane(message.lane())].increment();
                    self.receive(Node { slot, incarnation: source.node_incarnation }, message);
                }
                Err(error) => self.refuse(slot, &error.to_string()),
            },
            TransportEvent::Completed { work, ok } => {
                if !ok {
                    self.metrics.fabric_errors.increment();
                }
                let sender = self.transfers.borrow_mut().remove(&work);
                if let Some(sender) = sender {
                    sender.send(ok);
                }
            }
            TransportEvent::Connected { slot, node } => self.peer_connected(slot, node),
            TransportEvent::Disconnected { slot, reason } => {
                if let Some(peer) = self.peers.borrow_mut().get_mut(&slot) {
                    peer.connected = false;
                    peer.gone_since.get_or_insert_with(Instant::now);
                    peer.reason = Some(reason.clone());
                }
                tracing::info!(slot, reason, "peer disconnected");
                self.metrics.peers_lost.increment();
                self.peers_changed.notify();
            }
            TransportEvent::Lost { slot } => self.peer_lost(slot),
        }
    }

    fn peer_connected(self: &Rc<Self>, slot: Slot, node: Node) {
        let known = {
            let mut peers = self.peers.borrow_mut();
            let Some(peer) = peers.get_mut(&slot) else { return };
            let known = peer.node;
            peer.connected = true;
            peer.gone_since = None;
            peer.reason = None;
            peer.node = Some(node);
            known
        };
        if known.is_some_and(|known| known != node) {
            self.forget_peer(slot);
            self.peers.borrow_mut().entry(slot).and_modify(|peer| peer.node = Some(node));
        }
        tracing::info!(slot, incarnation = node.incarnation, "peer connected");
        let mut effects = Vec::new();
        self.lock_client.borrow_mut().server_back(slot, self.ticks(), &mut effects);
        self.client_effects.borrow_mut().extend(effects);
        self.peers_changed.notify();
        // Data of files removed while it was away may lie there.
        self.reap_orphans();
    }

    /// A peer's daemon is gone (and fenced: its process has ended).
    fn peer_lost(self: &Rc<Self>, slot: Slot) {
        {
            let mut peers = self.peers.borrow_mut();
            let Some(peer) = peers.get_mut(&slot) else { return };
            peer.connected = false;
            peer.node = None;
            peer.gone_since.get_or_insert_with(Instant::now);
        }
        self.forget_peer(slot);
        self.peers_changed.notify();
    }

    /// What a peer of a past incarnation held here goes; what it kept for this node is void.
    fn forget_peer(self: &Rc<Self>, slot: Slot) {
        tracing::warn!(slot, "peer gone: its locks are released, what it kept for this node is void");
        let calls: Vec<u64> =
            self.calls.borrow().iter().filter(|(_, call)| call.slot == slot).map(|(id, _)| *id).collect();
        for id in calls {
            let call = self.calls.borrow_mut().remove(&id);
            drop(call);
        }
        let mut server_effects = Vec::new();
        let uncommitted: Vec<Ino> = self.extents.borrow().uncommitted_inodes().collect();
        self.freeing_uncommitted(slot, true, &uncommitted, || {
            self.lock_server.borrow_mut().node_gone(slot, self.ticks(), &mut server_effects);
        });
        self.server_effects.borrow_mut().extend(server_effects);
        let mut client_effects = Vec::new();
        self.lock_client.borrow_mut().server_lost(slot, &mut client_effects);
        self.client_effects.borrow_mut().extend(client_effects);
        self.forget_openings(slot);
        self.forget_observers(slot);
        self.drop_hand_overs_from(slot);
        self.file_locks_of_lost_node(slot);
        self.arena_keys.borrow_mut().remove(&slot);
    }

    /// A message from a node, also this one.
    pub(crate) fn receive(self: &Rc<Self>, from: Node, message: Message) {
        match message {
            Message::Lock(envelope) => self.receive_lock(from, envelope),
            Message::HandOver(hand_over) => self.receive_hand_over(from.slot, hand_over),
            Message::Request { id, request } => {
                let volume = self.clone();
                self.spawn(async move {
                    let reply = volume.clone().serve(from, request).await.map_err(|error| error.0);
                    volume.send(from.slot, Message::Reply { id, reply });
                });
            }
            Message::Reply { id, reply } => {
                let call = self.calls.borrow_mut().remove(&id);
                match call {
                    Some(call) if call.slot == from.slot => call.sender.send(reply),
                    Some(_) => self.refuse(from.slot, "a reply to another node's request"),
                    None => {}
                }
            }
            Message::Beat { number, echo: false } => self.send(from.slot, Message::Beat { number, echo: true }),
            Message::Beat { .. } => {}
        }
    }

    /// What must be looked at now and then; called about every [`crate::node::TICK`].
    pub fn tick(self: &Rc<Self>) {
        self.tick_locks();
        self.prune_attributes();
        let gone: Vec<Slot> = {
            let peers = self.peers.borrow();
            let timeout = self.options.peer_timeout;
            peers
                .iter()
                .filter(|(_, peer)| peer.gone_since.is_some_and(|since| since.elapsed() >= timeout))
                .map(|(slot, _)| *slot)
                .collect()
        };
        if !gone.is_empty() {
            self.expire_pins(&gone);
            let timeout = self.options.peer_timeout;
            let expired: Vec<u64> = self
                .calls
                .borrow()
                .iter()
                .filter(|(_, call)| gone.contains(&call.slot) && call.since.elapsed() >= timeout)
                .map(|(id, _)| *id)
                .collect();
            for id in expired {
                let call = self.calls.borrow_mut().remove(&id);
                drop(call);
            }
        }
        let ticks = self.ticks();
        if ticks.saturating_sub(self.last_write_back.get()) >= crate::node::WRITE_BACK_INTERVAL.as_millis() as u64 {
            self.last_write_back.set(ticks);
            if self.cache.borrow().dirty_pages() > 0 {
                self.start_write_back();
            }
        }
    }
}

pub(crate) fn metric_lane(lane: verbfs_protocol::lock::Lane) -> crate::metrics::Lane {
    use crate::metrics::Lane as Metric;
    use verbfs_protocol::lock::Lane;
    match lane {
        Lane::Ns => Metric::NameSpace,
        Lane::Lock => Metric::Lock,
        Lane::Ctrl => Metric::Control,
        Lane::Io => Metric::Io,
        Lane::Ack => Metric::Ack,
    }
}
