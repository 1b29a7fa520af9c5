//! Decides whether a concurrent history is linearizable.
//!
//! A call may take effect at one instant (or, where the kernel itself asks several questions, at several instants in a
//! fixed order) between its start and its end. The search walks the starts and ends in real time and keeps every
//! *configuration* that explains all results seen so far: a state, and how far each call in progress has come. A call
//! is carried out as late as possible: only when it, or another one that must follow it, returns (just-in-time
//! linearization). When a call returns and no configuration can explain its result, the history is rejected, and this call
//! is where it became impossible.
//!
//! Two things keep the set small. Configurations are stored once (memoisation). And an *observer*, a call that changes
//! nothing and takes one step, is carried out in every configuration at the first moment its result is right:
//! having it behind is never a disadvantage.

use std::collections::HashSet;
use std::hash::Hash;

/// How one step of a call continues.
pub enum Step<S, L> {
    /// The call has taken its last effect, the state is now this.
    Done(S),
    /// The call has come so far; the state is now this.
    More(S, L),
}

/// A sequential specification.
pub trait Model {
    /// What the object looks like.
    type State: Clone + Eq + Hash + std::fmt::Debug;
    /// A call together with its result.
    type Op: Clone;
    /// What a call that takes several steps remembers between them.
    type Local: Clone + Eq + Hash + Default;

    /// All steps that `op`, having come to `local`, can take in `state` without contradicting its result.
    fn step(&self, state: &Self::State, op: &Self::Op, local: &Self::Local) -> Vec<Step<Self::State, Self::Local>>;

    /// Whether `op` takes one step and changes nothing.
    fn is_observer(&self, op: &Self::Op) -> bool;
}

/// A call in time. `end` is `None` when it never returned: it may or may not have taken effect.
#[derive(Clone, Debug)]
pub struct Timed<O> {
    /// When the call was about to start.
    pub start: u64,
    /// When its result was known.
    pub end: Option<u64>,
    /// The call and its result.
    pub op: O,
}

/// Why no verdict, or which.
pub enum Verdict<S> {
    /// Some order explains everything. The largest number of configurations held at once tells how hard it was.
    Linearizable { configurations: usize },
    /// No order explains it.
    Rejected(Rejection<S>),
    /// The search would have needed more than the allowed number of configurations.
    Undecided { at: usize, configurations: usize },
}

/// Where and how a history became impossible. Numbers are positions in the history given to [`check`].
pub struct Rejection<S> {
    /// The call whose result nothing explains.
    pub call: usize,
    /// A state in which the object certainly was, before the window.
    pub before: S,
    /// The calls which, started from `before`, suffice to show the contradiction; in order of start.
    pub window: Vec<usize>,
    /// Some of the states possible just before `call` returned.
    pub possible: Vec<S>,
}

/// Above this many configurations the search gives up rather than fill memory.
const CONFIGURATION_LIMIT: usize = 300_000;
/// More possible states than this help no reader.
const STATES_SHOWN: usize = 3;

#[derive(Clone, PartialEq, Eq, Hash)]
enum Progress<L> {
    At(L),
    Done,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Configuration<S, L> {
    state: S,
    /// One entry for each call in progress, in order of start.
    pending: Vec<(u32, Progress<L>)>,
}

/// A moment at which only one configuration was possible.
struct Certain<S> {
    state: S,
    /// Calls in progress which had not begun to take effect.
    waiting: Vec<usize>,
    event: usize,
}

enum Failure<S> {
    Rejected { call: usize, certain: Certain<S>, possible: Vec<S>, event: usize },
    Undecided { at: usize, configurations: usize },
}

struct Event {
    time: u64,
    is_return: bool,
    call: usize,
}

fn events<O>(history: &[Timed<O>]) -> Vec<Event> {
    let mut events = Vec::with_capacity(history.len() * 2);
    for (call, timed) in history.iter().enumerate() {
        events.push(Event { time: timed.start, is_return: false, call });
        if let Some(end) = timed.end {
            assert!(end >= timed.start, "call {call} ends before it starts");
            events.push(Event { time: end, is_return: true, call });
        }
    }
    // At equal times starts come first: calls that touch in time count as overlapping, the lenient reading.
    events.sort_by_key(|e| (e.time, e.is_return));
    events
}

/// Carry out every observer in progress whose result is right in the configuration's state.
fn settle<M: Model>(model: &M, history: &[Timed<M::Op>], c: &mut Configuration<M::State, M::Local>) {
    for (call, progress) in &mut c.pending {
        let op = &history[*call as usize].op;
        if *progress != Progress::Done
            && model.is_observer(op)
            && !model.step(&c.state, op, &M::Local::default()).is_empty()
        {
            *progress = Progress::Done;
        }
    }
}

type Configurations<M> = HashSet<Configuration<<M as Model>::State, <M as Model>::Local>>;

/// All ways to complete `call` from `from`; each result has `call` removed.
fn complete<M: Model>(
    model: &M,
    history: &[Timed<M::Op>],
    from: &Configurations<M>,
    call: usize,
) -> Result<Configurations<M>, usize> {
    let mut completed: Configurations<M> = HashSet::new();
    let mut seen: Configurations<M> = HashSet::new();
    let mut queue: Vec<_> = from.iter().cloned().collect();
    while let Some(c) = queue.pop() {
        let at = c.pending.iter().position(|p| p.0 as usize == call).expect("a returning call is in progress");
        if c.pending[at].1 == Progress::Done {
            let mut c = c;
            c.pending.remove(at);
            completed.insert(c);
            continue;
        }
        for (index, (other, progress)) in c.pending.iter().enumerate() {
            let Progress::At(local) = progress else { continue };
            let op = &history[*other as usize].op;
            if model.is_observer(op) {
                continue; // settled as soon as it can be
            }
            for step in model.step(&c.state, op, local) {
                let (state, progress) = match step {
                    Step::Done(state) => (state, Progress::Done),
                    Step::More(state, local) => (state, Progress::At(local)),
                };
                let mut next = Configuration { state, pending: c.pending.clone() };
                next.pending[index].1 = progress;
                settle(model, history, &mut next);
                if !seen.contains(&next) {
                    seen.insert(next.clone());
                    queue.push(next);
                }
            }
        }
        if seen.len() + completed.len() > CONFIGURATION_LIMIT {
            return Err(seen.len() + completed.len());
        }
    }
    Ok(completed)
}

fn search<M: Model>(model: &M, initial: &M::State, history: &[Timed<M::Op>]) -> Result<usize, Failure<M::State>> {
    let mut configurations: Configurations<M> = HashSet::new();
    configurations.insert(Configuration { state: initial.clone(), pending: Vec::new() });
    let mut certain = Certain { state: initial.clone(), waiting: Vec::new(), event: 0 };
    let mut most = 1;
    for (number, event) in events(history).iter().enumerate() {
        if !event.is_return {
            configurations = configurations
                .into_iter()
                .map(|mut c| {
                    c.pending.push((event.call as u32, Progress::At(M::Local::default())));
                    settle(model, history, &mut c);
                    c
                })
                .collect();
            continue;
        }
        let next = complete(model, history, &configurations, event.call)
            .map_err(|configurations| Failure::Undecided { at: event.call, configurations })?;
        if next.is_empty() {
            let mut possible: Vec<M::State> = Vec::new();
            for c in &configurations {
                if possible.len() < STATES_SHOWN && !possible.contains(&c.state) {
                    possible.push(c.state.clone());
                }
            }
            return Err(Failure::Rejected { call: event.call, certain, possible, event: number });
        }
        most = most.max(next.len());
        if next.len() == 1
            && let Some(c) = next.iter().next()
        {
            let fresh = Progress::At(M::Local::default());
            if c.pending.iter().all(|p| p.1 == Progress::Done || p.1 == fresh) {
                let waiting = c.pending.iter().filter(|p| p.1 == fresh).map(|p| p.0 as usize).collect();
                certain = Certain { state: c.state.clone(), waiting, event: number + 1 };
            }
        }
        configurations = next;
    }
    Ok(most)
}

/// Is `history`, begun in `initial`, linearizable? On rejection the window is reduced to what shows the contradiction.
pub fn check<M: Model>(model: &M, initial: &M::State, history: &[Timed<M::Op>]) -> Verdict<M::State> {
    match search(model, initial, history) {
        Ok(configurations) => Verdict::Linearizable { configurations },
        Err(Failure::Undecided { at, configurations }) => Verdict::Undecided { at, configurations },
        Err(Failure::Rejected { call, certain, possible, event }) => {
            let mut window = certain.waiting.clone();
            window.extend(events(history)[certain.event..=event].iter().filter(|e| !e.is_return).map(|e| e.call));
            let window = reduce(model, &certain.state, history, window, call);
            Verdict::Rejected(Rejection { call, before: certain.state, window, possible })
        }
    }
}

/// Leave out every call without which the contradiction stays. Only observers may go: leaving out a write would blame a
/// read of it.
fn reduce<M: Model>(
    model: &M,
    before: &M::State,
    history: &[Timed<M::Op>],
    mut window: Vec<usize>,
    culprit: usize,
) -> Vec<usize> {
    let limit = history[culprit].end;
    let fails = |window: &[usize]| {
        let calls: Vec<Timed<M::Op>> = window
            .iter()
            .map(|&w| {
                let mut timed = history[w].clone();
                // What returned after the culprit had, as far as the search went, not returned yet.
                timed.end = timed.end.filter(|end| Some(*end) <= limit);
                timed
            })
            .collect();
        matches!(search(model, before, &calls), Err(Failure::Rejected { .. }))
    };
    if !fails(&window) {
        return window;
    }
    let observers: Vec<usize> =
        window.iter().copied().filter(|&w| w != culprit && model.is_observer(&history[w].op)).collect();
    for chunk in [observers.len(), observers.len() / 4, 1] {
        if chunk == 0 {
            continue;
        }
        for group in observers.chunks(chunk) {
            let without: Vec<usize> = window.iter().copied().filter(|w| !group.contains(w)).collect();
            if without.len() < window.len() && fails(&without) {
                window = without;
            }
        }
    }
    window
}
