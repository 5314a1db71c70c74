//! What a create asks for, checked, with every default filled in.

use std::collections::BTreeMap;

use roost_common::ids::{IdError, SandboxId};
use roost_common::shim::MEMORY_RANGE;
use roost_common::units::{Mebibytes, Sectors, Vcpus};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::Config;
use crate::egress::{self, Egress, EgressError};
use crate::host::images::TemplateRef;
use crate::snapshot::Size;

/// Memory of a sandbox that asks for none.
pub const DEFAULT_MEMORY: Mebibytes = Mebibytes(512);
/// vCPUs of a sandbox that asks for none.
pub const DEFAULT_VCPUS: Vcpus = Vcpus(1);
/// Shortest inactivity limit, in seconds; 0 is none.
pub const MIN_TIMEOUT: u32 = 60;
/// Most bytes of a default environment, names and values together.
const MAX_ENV: usize = 64 << 10;
/// Longest name of a template.
const MAX_NAME: usize = 128;
/// Longest user name, as Linux has it.
const MAX_USER: usize = 32;

/// A create as it came, with the wire's types.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// The caller's id; empty: one of ours.
    pub id: String,
    /// The template's name, kept for listings.
    pub template_name: String,
    /// UUIDs; empty: all zero.
    pub team_id: String,
    /// As above.
    pub template_id: String,
    /// 0: the default.
    pub vcpus: i32,
    /// In MiB; 0: the default.
    pub memory_mb: i32,
    /// In MiB; 0: the default.
    pub disk_size_mb: i32,
    /// In seconds; 0: none.
    pub timeout_sec: i32,
    /// Empty: envd's default.
    pub default_user: String,
    /// Environment of all commands.
    pub default_env: BTreeMap<String, String>,
    /// What it may reach.
    pub egress: egress::Wish,
}

/// What is wrong with a wish.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WishError {
    /// The id is outside the grammar.
    #[error("sandbox_id is no sandbox id")]
    Id(#[source] IdError),
    /// Not a UUID.
    #[error("{field} {value:?} is no UUID")]
    Uuid {
        /// Which field.
        field: &'static str,
        /// What it was, cut short.
        value: String,
    },
    /// A number out of range.
    #[error("{field} of {value} is out of range: {min} to {max}, or 0 for the default")]
    OutOfRange {
        /// Which field.
        field: &'static str,
        /// What it was.
        value: i32,
        /// The least.
        min: u32,
        /// The most.
        max: u32,
    },
    /// No user name.
    #[error("default_user is no user name: up to 32 of a-z, A-Z, 0-9, '.', '_' and '-'")]
    User,
    /// No name of a template.
    #[error("name is no name of a template: up to 128 printable characters")]
    Name,
    /// A policy that is none.
    #[error("egress: {0}")]
    Egress(#[source] EgressError),
    /// An environment that no process can have.
    #[error("default_env is no environment: names without '=' and NUL, values without NUL, 64 KiB in all")]
    Env,
}

/// A checked create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The sandbox's id.
    pub id: SandboxId,
    /// What it is cut from.
    pub template: TemplateRef,
    /// The template's name, for listings.
    pub template_name: String,
    /// vCPUs.
    pub vcpus: Vcpus,
    /// Memory.
    pub memory: Mebibytes,
    /// Disk; unset: the image's size.
    pub disk: Option<Mebibytes>,
    /// Inactivity limit in seconds; 0 is none.
    pub timeout_sec: u32,
    /// Runs commands of calls that name no user.
    pub user: Option<String>,
    /// Environment of all commands.
    pub env: BTreeMap<String, String>,
    /// What it may reach: in a record now, elsewhere as it was when the sandbox was made or found. Records of before there were policies have
    /// none.
    #[serde(default)]
    pub egress: Egress,
}

impl Plan {
    /// Checks a wish and fills in its defaults: the template's size, where its memory has one, else ours. `new_id` is taken where the
    /// caller has none.
    ///
    /// # Errors
    /// Any [`WishError`], naming the field.
    pub fn check(
        wish: Wish,
        config: &Config,
        size_of: impl FnOnce(TemplateRef) -> Option<Size>,
        new_id: impl FnOnce() -> SandboxId,
    ) -> Result<Self, WishError> {
        let id = match wish.id.as_str() {
            "" => new_id(),
            given => given.parse().map_err(WishError::Id)?,
        };
        let template = template(&wish.team_id, &wish.template_id)?;
        let vcpus = number("vcpus", wish.vcpus, 1, config.max_vcpus.into())?;
        let memory = number(
            "memory_mb",
            wish.memory_mb,
            MEMORY_RANGE.start().0,
            config.max_memory_mb,
        )?;
        let disk = number("disk_size_mb", wish.disk_size_mb, 1, config.max_disk_mb)?;
        let timeout = timeout(wish.timeout_sec)?;
        let user = user(wish.default_user)?;
        let env = environment(wish.default_env)?;
        let egress = Egress::check(wish.egress).map_err(WishError::Egress)?;
        let size = size_of(template);
        let default_disk = if size.is_some() { None } else { config.default_disk_mb };
        Ok(Self {
            id,
            template,
            template_name: wish.template_name.chars().take(128).collect(),
            vcpus: match vcpus {
                Some(n) => Vcpus(u8::try_from(n).expect("at most max_vcpus, a u8")),
                None => size.map_or(DEFAULT_VCPUS, |size| size.vcpus),
            },
            memory: match memory {
                Some(mebibytes) => Mebibytes(mebibytes),
                None => size.map_or(DEFAULT_MEMORY, |size| size.memory),
            },
            disk: disk.or(default_disk).map(Mebibytes),
            timeout_sec: timeout.unwrap_or(0),
            user,
            env,
            egress,
        })
    }

    /// All defaults, for a sandbox of which only the id is known.
    pub fn unknown(id: SandboxId) -> Self {
        Self {
            id,
            template: TemplateRef::default(),
            template_name: String::new(),
            vcpus: DEFAULT_VCPUS,
            memory: DEFAULT_MEMORY,
            disk: None,
            timeout_sec: 0,
            user: None,
            env: BTreeMap::new(),
            egress: Egress::default(),
        }
    }

    /// Size of the disk over an image of `image` sectors: the asked one, else the image's, in whole chunks. `None` when the image
    /// is larger than what was asked for.
    pub fn disk_over(&self, image: Sectors) -> Option<Sectors> {
        let image = Sectors(image.0.next_multiple_of(roost_common::units::CHUNK_SECTORS));
        match self.disk {
            None => Some(image),
            Some(asked) => Some(asked.sectors()).filter(|asked| *asked >= image),
        }
    }
}

/// A checked inactivity limit; `None` for 0.
///
/// # Errors
/// [`WishError::OutOfRange`].
pub fn timeout(seconds: i32) -> Result<Option<u32>, WishError> {
    number("timeout_sec", seconds, MIN_TIMEOUT, i32::MAX.unsigned_abs())
}

/// A checked name of a template.
///
/// # Errors
/// [`WishError::Name`].
pub fn name(name: String) -> Result<String, WishError> {
    if name.chars().count() <= MAX_NAME && !name.contains(char::is_control) {
        Ok(name)
    } else {
        Err(WishError::Name)
    }
}

/// A checked user name; `None` for an empty one.
///
/// # Errors
/// [`WishError::User`].
pub fn user(name: String) -> Result<Option<String>, WishError> {
    let is_name = name.len() <= MAX_USER
        && !name.starts_with('-')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if is_name {
        Ok(Some(name).filter(|name| !name.is_empty()))
    } else {
        Err(WishError::User)
    }
}

/// A checked environment.
///
/// # Errors
/// [`WishError::Env`].
pub fn environment(env: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, WishError> {
    let bytes: usize = env.iter().map(|(name, value)| name.len() + value.len()).sum();
    let bad_pair =
        |(name, value): (&String, &String)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0');
    if bytes > MAX_ENV || env.iter().any(bad_pair) {
        Err(WishError::Env)
    } else {
        Ok(env)
    }
}

/// Which template a request names.
///
/// # Errors
/// [`WishError::Uuid`].
pub fn template(team: &str, template: &str) -> Result<TemplateRef, WishError> {
    Ok(TemplateRef {
        team: uuid("team_id", team)?,
        template: uuid("template_id", template)?,
    })
}

fn uuid(field: &'static str, text: &str) -> Result<Uuid, WishError> {
    if text.is_empty() {
        return Ok(Uuid::nil());
    }
    // The plain form only: urn:uuid:…, {…} and the like are other strings for the same id.
    let plain = (text.len() == 36).then(|| Uuid::try_parse(text).ok()).flatten();
    plain.ok_or_else(|| WishError::Uuid {
        field,
        value: text.chars().take(64).collect(),
    })
}

/// `None` for 0, which asks for the default.
fn number(field: &'static str, value: i32, min: u32, max: u32) -> Result<Option<u32>, WishError> {
    if value == 0 {
        return Ok(None);
    }
    match u32::try_from(value) {
        Ok(number) if (min..=max).contains(&number) => Ok(Some(number)),
        _ => Err(WishError::OutOfRange { field, value, min, max }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wish: Wish) -> Result<Plan, WishError> {
        Plan::check(wish, &Config::default(), |_| None, || "new".parse().expect("an id"))
    }

    #[test]
    fn an_empty_wish_is_the_minimal_image_with_all_defaults() {
        let plan = check(Wish::default()).expect("checked");
        assert_eq!(plan.id.as_str(), "new");
        assert!(plan.template.is_minimal());
        assert_eq!((plan.vcpus, plan.memory, plan.disk), (Vcpus(1), Mebibytes(512), None));
        assert_eq!(plan.disk_over(Sectors(1001)), Some(Sectors(1008)));
    }

    #[test]
    fn a_disk_smaller_than_its_image_is_no_disk() {
        let plan = check(Wish {
            disk_size_mb: 10,
            ..Wish::default()
        })
        .expect("checked");
        assert_eq!(plan.disk_over(Mebibytes(10).sectors()), Some(Mebibytes(10).sectors()));
        assert_eq!(plan.disk_over(Mebibytes(11).sectors()), None);
    }

    #[test]
    fn every_field_out_of_bounds_is_refused_by_name() {
        let env = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let wishes = [
            (
                "sandbox_id",
                Wish {
                    id: "../x".into(),
                    ..Wish::default()
                },
            ),
            (
                "sandbox_id",
                Wish {
                    id: "x".repeat(64),
                    ..Wish::default()
                },
            ),
            (
                "team_id",
                Wish {
                    team_id: "x".into(),
                    ..Wish::default()
                },
            ),
            (
                "template_id",
                Wish {
                    template_id: "{67e55044-10b1-426f-9247-bb680e5fe0c8}".into(),
                    ..Wish::default()
                },
            ),
            (
                "template_id",
                Wish {
                    template_id: "../../etc/passwd".into(),
                    ..Wish::default()
                },
            ),
            (
                "vcpus",
                Wish {
                    vcpus: -1,
                    ..Wish::default()
                },
            ),
            (
                "vcpus",
                Wish {
                    vcpus: 33,
                    ..Wish::default()
                },
            ),
            (
                "vcpus",
                Wish {
                    vcpus: i32::MAX,
                    ..Wish::default()
                },
            ),
            (
                "memory_mb",
                Wish {
                    memory_mb: 1,
                    ..Wish::default()
                },
            ),
            (
                "memory_mb",
                Wish {
                    memory_mb: i32::MAX,
                    ..Wish::default()
                },
            ),
            (
                "disk_size_mb",
                Wish {
                    disk_size_mb: -5,
                    ..Wish::default()
                },
            ),
            (
                "disk_size_mb",
                Wish {
                    disk_size_mb: i32::MAX,
                    ..Wish::default()
                },
            ),
            (
                "timeout_sec",
                Wish {
                    timeout_sec: 59,
                    ..Wish::default()
                },
            ),
            (
                "timeout_sec",
                Wish {
                    timeout_sec: i32::MIN,
                    ..Wish::default()
                },
            ),
            (
                "default_user",
                Wish {
                    default_user: "a b".into(),
                    ..Wish::default()
                },
            ),
            (
                "default_user",
                Wish {
                    default_user: "x".repeat(33),
                    ..Wish::default()
                },
            ),
            (
                "default_env",
                Wish {
                    default_env: env("", "x"),
                    ..Wish::default()
                },
            ),
            (
                "default_env",
                Wish {
                    default_env: env("a=b", "x"),
                    ..Wish::default()
                },
            ),
            (
                "default_env",
                Wish {
                    default_env: env("a", "\0"),
                    ..Wish::default()
                },
            ),
            (
                "default_env",
                Wish {
                    default_env: env("a", &"x".repeat(MAX_ENV)),
                    ..Wish::default()
                },
            ),
        ];
        for (field, wish) in wishes {
            let error = check(wish.clone()).expect_err(&format!("{wish:?}"));
            assert!(error.to_string().contains(field), "{error} does not name {field}");
        }
    }
}
