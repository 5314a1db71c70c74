//! `roost template`: templates of other people's images, and those that a host has.
//!
//! | module | holds |
//! |---|---|
//! | [`build`] | the command: source, image, agent, memory |
//! | [`archive`], [`oci`], [`directory`], [`debian`] | what it reads: tar archives, images of containers, directories, what mmdebstrap makes |
//! | [`tree`], [`spool`] | the files of an image, merged from layers, and what is in them |
//! | [`ext4`] | the image, by e2fsprogs |
//! | [`upload`], [`warm`] | the image's way to the agent, and its memory |
//!
//! The agent's program links none of this: it takes an image as bytes ([`crate::templates::import`]).

pub(crate) mod archive;
pub(super) mod build;
mod debian;
mod directory;
mod ext4;
#[cfg(any(test, fuzzing))]
mod judge;
pub(crate) mod oci;
mod spool;
#[cfg(test)]
mod tests;
pub(crate) mod tree;
mod upload;
mod warm;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use uuid::Uuid;

use super::client::{Client, Operator};
use super::{CliError, age, print, print_json, table};
use crate::sandbox::unix_now;
use build::Build;
#[cfg(any(test, fuzzing))]
pub(crate) use judge::{judge_archive, judge_image};
use roost_hostagent::hostagent::v1::DeleteSnapshotRequest;
use roost_hostagent::roost::v1::{
    InspectTemplateRequest, InspectTemplateResponse, ListTemplatesRequest, Template, VerifyTemplateRequest,
};

#[derive(Args)]
pub(super) struct Templates {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a template of a root filesystem or a container's image; prints its UUID
    Build(Box<Build>),
    /// List the templates of the host
    Ls,
    /// Show what is known of a template
    Inspect(Which),
    /// Read a template's files and say whether they are as they were when it was made
    Verify(Which),
    /// Delete templates; sandboxes that were made of them keep what they need
    Rm {
        /// The templates, by UUID or name
        #[arg(required = true)]
        templates: Vec<String>,
        /// UUID of the team that they belong to, where several have one of that name
        #[arg(long, value_name = "UUID")]
        team: Option<Uuid>,
    },
}

#[derive(Args)]
struct Which {
    /// UUID or name of the template
    template: String,
    /// UUID of the team that it belongs to, where several have one of that name
    #[arg(long, value_name = "UUID")]
    team: Option<Uuid>,
}

/// A template that is not found, or not by this alone.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResolveError {
    #[error("no template {0:?} on this host; `roost template ls` lists them")]
    None(String),
    #[error("{name:?} is the name of several templates: {found}; say the UUID, and --team where that is needed")]
    Several { name: String, found: String },
}

/// Does what is asked for.
pub(super) async fn run(
    client: &Client,
    operator: &Operator,
    wish: Templates,
    json: bool,
) -> Result<ExitCode, CliError> {
    match wish.command {
        Command::Build(wish) => build::build(client, operator, *wish, json).await?,
        Command::Ls => list(operator, json).await?,
        Command::Inspect(which) => {
            let found = resolve(operator, &which.template, which.team).await?;
            let request = InspectTemplateRequest {
                team_id: found.team_id,
                template_id: found.template_id,
                ..InspectTemplateRequest::default()
            };
            let answer = operator.inspect_template(request).await?.into_owned();
            if json {
                print_json(&answer)?;
            } else {
                print(format_args!("{}", described(answer)))?;
            }
        }
        Command::Verify(which) => return verify(operator, which, json).await,
        Command::Rm { templates, team } => {
            let mut code = ExitCode::SUCCESS;
            for template in templates {
                if let Err(error) = remove(client, operator, &template, team).await {
                    eprintln!("roost: {}", crate::errors::Chain(&error));
                    code = ExitCode::FAILURE;
                }
            }
            return Ok(code);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Finds the template that somebody means by a UUID or a name.
pub(super) async fn resolve(operator: &Operator, wanted: &str, team: Option<Uuid>) -> Result<Template, CliError> {
    let answer = operator.list_templates(ListTemplatesRequest::default()).await?;
    Ok(choose(answer.into_owned().templates, wanted, team)?)
}

fn choose(all: Vec<Template>, wanted: &str, team: Option<Uuid>) -> Result<Template, ResolveError> {
    let team = team.map(|team| team.to_string());
    let id = Uuid::try_parse(wanted).ok().map(|id| id.to_string());
    let mut found = all;
    found.retain(|template| {
        let is_meant = id
            .as_ref()
            .map_or(template.name == wanted, |id| template.template_id == *id);
        is_meant && team.as_ref().is_none_or(|team| template.team_id == *team)
    });
    match found.len() {
        0 => Err(ResolveError::None(wanted.to_owned())),
        1 => Ok(found.remove(0)),
        _ => {
            let several = found
                .iter()
                .map(|one| format!("{} of team {}", one.template_id, one.team_id));
            Err(ResolveError::Several {
                name: wanted.to_owned(),
                found: several.collect::<Vec<_>>().join(", "),
            })
        }
    }
}

async fn remove(client: &Client, operator: &Operator, wanted: &str, team: Option<Uuid>) -> Result<(), CliError> {
    let found = resolve(operator, wanted, team).await?;
    let request = DeleteSnapshotRequest {
        team_id: found.team_id,
        template_id: found.template_id,
        ..DeleteSnapshotRequest::default()
    };
    client.delete_snapshot(request).await?;
    Ok(())
}

async fn list(operator: &Operator, json: bool) -> Result<(), CliError> {
    let answer = operator
        .list_templates(ListTemplatesRequest::default())
        .await?
        .into_owned();
    if json {
        return print_json(&answer);
    }
    let header = ["TEMPLATE", "NAME", "DISK", "SIZE", "MEMORY", "SANDBOXES", "AGE", "TEAM"].map(str::to_owned);
    let rows = answer.templates.iter().map(row);
    table(std::iter::once(header).chain(rows).collect())
}

fn row(template: &Template) -> [String; 8] {
    let size = template.rootfs_allocated.saturating_add(template.memory_allocated);
    let mut name = template.name.clone();
    if !template.broken.is_empty() {
        name.push_str(" (BROKEN)");
    }
    [
        template.template_id.clone(),
        name,
        mebibytes(template.rootfs_length),
        mebibytes(size),
        if template.has_memory {
            mebibytes(template.memory_allocated)
        } else {
            "-".to_owned()
        },
        template.sandboxes.to_string(),
        match template.made_at_unix {
            0 => "-".to_owned(),
            made => age(unix_now().saturating_sub(made)),
        },
        if template.team_id == Uuid::nil().to_string() {
            "-".to_owned()
        } else {
            template.team_id.clone()
        },
    ]
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn described(answer: InspectTemplateResponse) -> String {
    let template = answer.template.into_option().unwrap_or_default();
    let or_none = |text: &str| if text.is_empty() { "none" } else { text }.to_owned();
    let mut lines = vec![
        ("template", template.template_id.clone()),
        ("team", template.team_id.clone()),
        ("name", template.name.clone()),
        ("sandboxes", template.sandboxes.to_string()),
        (
            "disk",
            format!(
                "{}, of which {} are allocated",
                mebibytes(template.rootfs_length),
                mebibytes(template.rootfs_allocated)
            ),
        ),
        ("checksum", or_none(&template.rootfs_digest)),
    ];
    if template.has_memory {
        lines.push((
            "memory",
            format!("{} are allocated", mebibytes(template.memory_allocated)),
        ));
        lines.push(("checksum", or_none(&template.memory_digest)));
    }
    if let Some(memory) = answer.memory.into_option() {
        lines.push((
            "wakes",
            format!(
                "{} vCPUs, {} MiB of memory, a disk of {} MiB",
                memory.vcpus, memory.memory_mb, memory.disk_size_mb
            ),
        ));
        lines.push((
            "made with",
            format!(
                "kernel {}, VMM {}, envd {}, on {}",
                memory.kernel_version, memory.vmm_version, memory.envd_version, memory.cpu_model
            ),
        ));
    }
    if !template.broken.is_empty() {
        lines.push(("BROKEN", template.broken.clone()));
    }
    let lines = lines.into_iter().map(|(what, value)| format!("{what:<10} {value}\n"));
    lines
        .collect::<String>()
        .replace(|c: char| c.is_control() && c != '\n', "?")
}

/// Prints what became of each file; fails where one is not as it was.
async fn verify(operator: &Operator, which: Which, json: bool) -> Result<ExitCode, CliError> {
    let found = resolve(operator, &which.template, which.team).await?;
    let request = VerifyTemplateRequest {
        team_id: found.team_id,
        template_id: found.template_id,
        ..VerifyTemplateRequest::default()
    };
    let answer = operator.verify_template(request).await?.into_owned();
    if json {
        print_json(&answer)?;
    } else {
        for file in &answer.files {
            let colon = if file.detail.is_empty() { "" } else { ": " };
            print(format_args!("{}  {}{colon}{}\n", file.file, file.outcome, file.detail))?;
        }
    }
    let is_whole = answer
        .files
        .iter()
        .all(|file| matches!(file.outcome.as_str(), "ok" | "unchecked"));
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
