//! A caller: asks for this and that, waits for the answer or does not, and remembers what it was told.

use std::sync::Arc;
use std::time::Duration;

use roost_agent::egress::{self, Egress};
use roost_agent::errors::Chain;
use roost_agent::host::images::TemplateRef;
use roost_agent::registry::Registry;
use roost_agent::sandbox::plan::{Plan, Wish};
use roost_agent::sandbox::resume::From;
use roost_agent::sandbox::task::Handle;
use roost_agent::sandbox::{
    CaptureWish, CreateFailure, EgressFailure, PauseFailure, PauseReason, ResumeError, ResumeFailure, ResumeWish,
};
use roost_agent::templates::{self, CaptureKind};
use roost_common::ids::SandboxId;
use uuid::Uuid;

use crate::dice::Dice;
use crate::oracle::Oracle;
use crate::vmm::MEMORY;
use crate::world::World;

/// How long an answer may take: a capture, a pause that is tried three times and a destroy wait for each other, each step up to its limit.
const ANSWER_LIMIT: Duration = Duration::from_secs(2 * 3600);

/// Those that callers make, use and delete.
pub(crate) fn templates() -> [TemplateRef; 2] {
    [1, 2].map(|number| TemplateRef {
        team: Uuid::from_u128(7),
        template: Uuid::from_u128(number),
    })
}

/// What sandboxes may reach. By name nothing, for that has listeners of its own.
fn policies() -> [egress::Wish; 4] {
    [
        ("", ""),
        ("", "192.0.2.0/24"),
        ("198.51.100.0/24", ""),
        ("", "0.0.0.0/0"),
    ]
    .map(|(allow, deny)| egress::Wish {
        no_internet: deny == "0.0.0.0/0",
        allow: allow.split_whitespace().map(str::to_owned).collect(),
        deny: deny.split_whitespace().map(str::to_owned).collect(),
        ..egress::Wish::default()
    })
}

/// One caller.
pub(crate) struct Caller {
    pub(crate) world: Arc<World>,
    pub(crate) oracle: Arc<Oracle>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) ids: Vec<SandboxId>,
    pub(crate) dice: Dice,
    /// Nothing goes wrong, so nothing may fail.
    pub(crate) is_calm: bool,
}

impl Caller {
    /// Asks for so many things, one after the other.
    pub(crate) async fn call(mut self, times: u64) {
        for _ in 0..times {
            let think = if self.dice.chance(200) { 300_000 } else { 3000 };
            tokio::time::sleep(self.dice.millis(think)).await;
            let index = usize::try_from(self.dice.roll(self.ids.len() as u64)).expect("an index");
            let id = self.ids[index].clone();
            match self.registry.find(&id) {
                None => self.create(id).await,
                Some(handle) => match self.dice.roll(23) {
                    0..6 => self.pause(&handle).await,
                    6..12 => self.resume(&handle).await,
                    12..14 => self.destroy(&handle).await,
                    14..17 => self.capture(&handle).await,
                    17 => self.hold(&handle).await,
                    18 => self.create(id).await,
                    19..22 => self.set_egress(&handle).await,
                    _ => self.delete_template().await,
                },
            }
        }
    }

    /// The answer to a call; `None` where it was not waited for.
    async fn answer<T>(&mut self, what: &str, id: &SandboxId, call: impl Future<Output = T>) -> Option<T> {
        let patience = if self.dice.chance(200) {
            self.dice.millis(3000)
        } else {
            ANSWER_LIMIT
        };
        let answer = tokio::time::timeout(patience, call).await.ok();
        if answer.is_none() && patience == ANSWER_LIMIT {
            self.world.wrong(format!("a {what} of {id} is never answered"));
        }
        answer
    }

    /// An error where nothing goes wrong.
    fn failed(&self, what: &str, id: &SandboxId, error: &(dyn std::error::Error + 'static)) {
        if self.is_calm {
            self.world.wrong(format!("{what} of {id}: {}", Chain(error)));
        }
    }

    async fn create(&mut self, id: SandboxId) {
        let template = if self.dice.chance(400) {
            self.dice.one_of(&templates())
        } else {
            TemplateRef::default()
        };
        let is_minimal = template.is_minimal();
        let wish = Wish {
            id: id.to_string(),
            team_id: template.team.to_string(),
            template_id: template.template.to_string(),
            memory_mb: i32::try_from(MEMORY >> 20).expect("MiB"),
            timeout_sec: self.dice.one_of(&[0, 0, 60, 200]),
            egress: self.policy(),
            ..Wish::default()
        };
        let host = self.registry.host().clone();
        let images = host.layout.images();
        let plan = Plan::check(
            wish,
            &host.config(),
            |which| templates::size(&images, which),
            || unreachable!("it has an id"),
        );
        let before = self.oracle.before(&id);
        // Refused: it is there, or no slot is.
        let Ok((_, outcome)) = self.registry.create(plan.expect("checked")) else {
            return;
        };
        if !self.oracle.may_be_made(&id) {
            self.world.wrong(format!("{id} was paused, and is made anew"));
        }
        match self.answer("create", &id, outcome).await {
            Some(Ok(Ok(()))) => self.oracle.was_made(&id, before),
            Some(Ok(Err(error @ CreateFailure::Failed(_)))) if is_minimal => self.failed("a create", &id, &error),
            Some(Ok(Err(_))) => {}
            None => self.oracle.was_abandoned(&id),
            Some(Err(_)) => self.world.wrong(format!("a create of {id} has no answer")),
        }
    }

    async fn destroy(&mut self, handle: &Handle) {
        let id = &handle.plan.id;
        let disturbance = self.oracle.end(id);
        match self.answer("destroy", id, handle.destroy()).await {
            Some(Ok(())) => disturbance.was_done(),
            Some(Err(error)) => self.failed("a destroy", id, error.as_ref()),
            None => {}
        }
    }

    async fn pause(&mut self, handle: &Handle) {
        let id = &handle.plan.id;
        let before = self.oracle.before(id);
        match self.answer("pause", id, handle.pause(PauseReason::Requested)).await {
            Some(Ok(())) => self.oracle.was_paused(id, before),
            Some(Err(error @ PauseFailure::Failed(_))) => self.failed("a pause", id, &error),
            Some(Err(PauseFailure::Refused(_))) | None => {}
        }
    }

    async fn resume(&mut self, handle: &Handle) {
        let id = &handle.plan.id;
        let disturbance = self.oracle.disturb(id);
        let from = if self.dice.chance(150) {
            From::Disk
        } else {
            From::Memory
        };
        let wish = ResumeWish {
            from,
            ..ResumeWish::default()
        };
        match self.answer("resume", id, handle.resume(wish)).await {
            None => {}
            Some(Ok(())) => disturbance.was_done(),
            Some(Err(error)) => {
                disturbance.was_in_vain();
                match &error {
                    ResumeFailure::Failed(why)
                        if !matches!(why.as_ref(), ResumeError::Spent | ResumeError::Stopped) =>
                    {
                        self.failed("a resume", id, &error);
                    }
                    ResumeFailure::Failed(_) | ResumeFailure::Refused(_) | ResumeFailure::Host(_) => {}
                }
            }
        }
    }

    fn policy(&mut self) -> egress::Wish {
        let number = usize::try_from(self.dice.roll(4)).expect("a number");
        policies()[number].clone()
    }

    async fn set_egress(&mut self, handle: &Handle) {
        let id = &handle.plan.id;
        let egress = Egress::check(self.policy()).expect("one of ours");
        let before = self.oracle.egress_changes(id);
        match self
            .answer("change of policy", id, handle.set_egress(egress.clone()))
            .await
        {
            Some(Ok(())) => self.oracle.egress_changed(id, before, Some(egress)),
            Some(Err(error)) => {
                self.oracle.egress_changed(id, before, None);
                if !matches!(error, EgressFailure::Refused(_)) {
                    self.failed("a change of policy", id, &error);
                }
            }
            None => {}
        }
    }

    async fn capture(&mut self, handle: &Handle) {
        let wish = CaptureWish {
            kind: self
                .dice
                .one_of(&[CaptureKind::Snapshot, CaptureKind::Snapshot, CaptureKind::Rootfs]),
            template: self.dice.one_of(&templates()),
            name: String::new(),
        };
        // It is there already, mostly.
        drop(self.answer("capture", &handle.plan.id, handle.capture(wish)).await);
    }

    async fn delete_template(&mut self) {
        let (images, template) = (self.registry.host().layout.images(), self.dice.one_of(&templates()));
        drop(templates::delete(&images, template));
    }

    /// Holds a guest for a while, as for want of room.
    async fn hold(&mut self, handle: &Handle) {
        let id = &handle.plan.id;
        self.answer("hold", id, handle.hold()).await;
        tokio::time::sleep(self.dice.millis(20_000)).await;
        while handle.hold_state().is_held() {
            self.answer("release", id, handle.release()).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
}
