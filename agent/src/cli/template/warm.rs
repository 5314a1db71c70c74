//! A template's memory: a sandbox of it is booted once, and made the template that was asked for.

use uuid::Uuid;

use super::super::client::{Client, Operator};
use super::super::{CliError, words};
use super::build::{BuildError, interrupted};
use crate::errors::Chain;
use roost_hostagent::hostagent::v1::{
    CreateSandboxRequest, CreateSnapshotRequest, DeleteSnapshotRequest, DestroySandboxRequest,
};
use roost_hostagent::roost::v1::InspectTemplateRequest;

/// A template with memory that is made of one without.
pub(super) struct Warm<'a> {
    pub(super) client: &'a Client,
    pub(super) operator: &'a Operator,
    pub(super) team: String,
    pub(super) name: String,
    pub(super) template: Uuid,
    pub(super) vcpus: i32,
    pub(super) memory: i32,
    pub(super) disk: i32,
}

impl Warm<'_> {
    /// Makes the template of a sandbox of the template `first`, which goes. Whether it has memory.
    pub(super) async fn make(&self, first: Uuid) -> Result<bool, CliError> {
        let sandbox = format!("template-{}", first.simple());
        let made = tokio::select! {
            made = self.capture(first, &sandbox) => made,
            () = interrupted() => Err(BuildError::Interrupted.into()),
        };
        // Whatever became of it: the sandbox, which waits for a snapshot under way, and what it was made of.
        let request = DestroySandboxRequest {
            sandbox_id: sandbox.clone(),
            ..DestroySandboxRequest::default()
        };
        match self.client.destroy_sandbox(request).await {
            Err(error) if error.code != connectrpc::ErrorCode::NotFound => {
                eprintln!("roost: sandbox {sandbox} was not destroyed: {}", words(&error));
            }
            _ => {}
        }
        self.delete(first).await;
        if let Err(error) = made {
            // A snapshot that was made although nobody waited for it.
            if matches!(error, CliError::Build(BuildError::Interrupted)) {
                self.delete(self.template).await;
            }
            return Err(error);
        }
        let request = InspectTemplateRequest {
            team_id: self.team.clone(),
            template_id: self.template.to_string(),
            ..InspectTemplateRequest::default()
        };
        let answer = self.operator.inspect_template(request).await?.into_owned();
        let has_memory = answer
            .template
            .into_option()
            .is_some_and(|template| template.has_memory);
        if !has_memory {
            eprintln!(
                "roost: the template has no memory, and sandboxes of it boot: not all programs of the guest could be stopped for a snapshot"
            );
        }
        Ok(has_memory)
    }

    async fn capture(&self, first: Uuid, sandbox: &str) -> Result<(), CliError> {
        let request = CreateSandboxRequest {
            sandbox_id: sandbox.to_owned(),
            team_id: self.team.clone(),
            template_id: first.to_string(),
            vcpus: self.vcpus,
            memory_mb: self.memory,
            disk_size_mb: self.disk,
            ..CreateSandboxRequest::default()
        };
        // Answered once commands can be run.
        self.client.create_sandbox(request).await?;
        let request = CreateSnapshotRequest {
            sandbox_id: sandbox.to_owned(),
            name: self.name.clone(),
            team_id: self.team.clone(),
            template_id: self.template.to_string(),
            ..CreateSnapshotRequest::default()
        };
        self.client.create_snapshot(request).await?;
        Ok(())
    }

    async fn delete(&self, template: Uuid) {
        let request = DeleteSnapshotRequest {
            team_id: self.team.clone(),
            template_id: template.to_string(),
            ..DeleteSnapshotRequest::default()
        };
        if let Err(error) = self.client.delete_snapshot(request).await {
            eprintln!(
                "roost: template {template} was not deleted: {}",
                Chain(&CliError::Call(error))
            );
        }
    }
}
