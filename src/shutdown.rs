//! Ends what was begun: every task of a gateway is spawned here, and ended from here.

use tokio::runtime::Handle;
use tokio_util::{
    future::FutureExt,
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};

/// The tasks of one part of a gateway. Clones own them together.
#[derive(Clone)]
pub struct Tasks {
    runtime: Handle,
    tracker: TaskTracker,
    ended: CancellationToken,
}

/// Ends a task when it is dropped.
pub struct Ending(#[expect(dead_code, reason = "kept for its drop")] AbortOnDropHandle<Option<()>>);

impl Tasks {
    /// Tasks that run on `runtime`.
    pub fn new(runtime: Handle) -> Tasks {
        Tasks { runtime, tracker: TaskTracker::new(), ended: CancellationToken::new() }
    }

    /// Runs `task` until it returns or [`Tasks::end`] drops it at its next await.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn_on(task.with_cancellation_token_owned(self.ended.clone()), &self.runtime);
    }

    /// As [`Tasks::spawn`], but the task ends with what is returned, too.
    pub fn spawn_ending(&self, task: impl Future<Output = ()> + Send + 'static) -> Ending {
        let task = task.with_cancellation_token_owned(self.ended.clone());
        Ending(AbortOnDropHandle::new(self.tracker.spawn_on(task, &self.runtime)))
    }

    /// While this is kept, sockets that the current thread makes belong to the runtime of these tasks.
    pub fn enter(&self) -> tokio::runtime::EnterGuard<'_> {
        self.runtime.enter()
    }

    /// Resolves when all tasks have returned, and no more can be expected.
    pub async fn finished(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Drops every task that [`Tasks::spawn`] began, and waits for all.
    pub async fn end(&self) {
        self.ended.cancel();
        self.finished().await;
    }
}
