//! Users and groups, read from `/etc/passwd` and `/etc/group`.
//!
//! By hand, because envd is linked statically and the C library's lookups load plug-ins at run time. So only what is in
//! these two files exists for envd; a template that keeps users elsewhere does not have them here.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;

/// One line of `/etc/passwd`, and the user's groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Groups whose member lists name the user, and the primary group.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// More than this of either file is not read: they come with a template, and envd's memory is the guest's.
const MAX_FILE: u64 = 4 << 20;

/// As many as the kernel takes (NGROUPS_MAX).
const MAX_GROUPS: usize = 65536;

/// Why there is no such user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error("there is no user {0:?}")]
    Unknown(String),
    #[error("cannot read {path}")]
    Read { path: String, source: std::io::Error },
}

/// Looks a user up by name, below `root` ("/" in the guest). `root` the user always exists.
pub(crate) fn by_name(root: &Path, name: &str) -> Result<User, UserError> {
    find(root, |entry| entry.name == name)?
        .or_else(|| (name == "root").then(superuser))
        .ok_or_else(|| UserError::Unknown(name.to_owned()))
}

/// Looks a user up by number.
pub(crate) fn by_uid(root: &Path, uid: u32) -> Result<User, UserError> {
    find(root, |entry| entry.uid == uid)?
        .or_else(|| (uid == 0).then(superuser))
        .ok_or_else(|| UserError::Unknown(uid.to_string()))
}

fn find(root: &Path, wanted: impl Fn(&User) -> bool) -> Result<Option<User>, UserError> {
    let passwd = read(&root.join("etc/passwd"))?;
    let Some(mut user) = passwd.lines().filter_map(passwd_line).find(wanted) else {
        return Ok(None);
    };
    let group = read(&root.join("etc/group"))?;
    user.groups = groups_of(&group, &user.name, user.gid);
    Ok(Some(user))
}

/// The text of a file; of a missing one, nothing. Bytes that are not UTF-8 become replacement characters.
fn read(path: &Path) -> Result<String, UserError> {
    let mut text = Vec::new();
    match std::fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text)) {
        Ok(_) => Ok(String::from_utf8_lossy(&text).into_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(UserError::Read {
            path: path.display().to_string(),
            source,
        }),
    }
}

fn passwd_line(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let (name, _password, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (_comment, home, shell) = (fields.next()?, fields.next()?, fields.next()?);
    if name.is_empty() {
        return None;
    }
    let or = |text: &str, default: &str| if text.is_empty() { default } else { text }.to_owned();
    Some(User {
        name: name.to_owned(),
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        groups: vec![],
        home: or(home, "/"),
        shell: or(shell, "/bin/sh"),
    })
}

fn groups_of(file: &str, name: &str, primary: u32) -> Vec<u32> {
    let mut groups = vec![primary];
    for line in file.lines() {
        let mut fields = line.split(':');
        let (Some(_), Some(_), Some(gid), Some(members)) = (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if let Ok(gid) = gid.parse()
            && members.split(',').any(|member| member == name)
            && !groups.contains(&gid)
            && groups.len() < MAX_GROUPS
        {
            groups.push(gid);
        }
    }
    groups
}

fn superuser() -> User {
    User {
        name: "root".to_owned(),
        uid: 0,
        gid: 0,
        groups: vec![0],
        home: "/root".to_owned(),
        shell: "/bin/sh".to_owned(),
    }
}

/// The names of users and groups by their numbers; those without a name go by their number.
pub(crate) struct Names {
    users: BTreeMap<u32, String>,
    groups: BTreeMap<u32, String>,
}

impl Names {
    /// Reads both files below `root`. What cannot be read names nobody.
    pub(crate) fn read(root: &Path) -> Self {
        // The first line of a number counts, as for the C library.
        let passwd = read(&root.join("etc/passwd")).unwrap_or_default();
        let users = passwd.lines().rev().filter_map(passwd_line);
        let mut users: BTreeMap<_, _> = users.map(|user| (user.uid, user.name)).collect();
        users.entry(0).or_insert_with(|| "root".to_owned());
        let group = read(&root.join("etc/group")).unwrap_or_default();
        let group_line = |line: &str| {
            let mut fields = line.split(':');
            let (name, _password, gid) = (fields.next()?, fields.next()?, fields.next()?);
            Some((gid.parse().ok()?, name.to_owned()))
        };
        let mut groups: BTreeMap<_, _> = group.lines().rev().filter_map(group_line).collect();
        groups.entry(0).or_insert_with(|| "root".to_owned());
        Self { users, groups }
    }

    pub(crate) fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    pub(crate) fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

impl User {
    /// PATH as login(1) sets it on Debian (`ENV_SUPATH` and `ENV_PATH` of login.defs).
    pub(crate) fn login_path(&self) -> &'static str {
        if self.uid == 0 {
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        } else {
            "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dir;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        broken line\n\
        :x:5:5::/:\n\
        bad:x:minus:1::/:\n\
        user:x:1000:1001:A User,,,:/home/user:/bin/zsh\n\
        bare:x:1002:1002:::\n";
    const GROUP: &str = "root:x:0:\nuser:x:1001:\nsudo:x:27:other,user\nusers:x:100:user,user2\n\
        like:x:7:user2\nbad:x:y:user\nagain:x:27:user\n";

    fn root() -> Dir {
        let dir = Dir::new("users");
        std::fs::create_dir_all(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), PASSWD).unwrap();
        std::fs::write(dir.path().join("etc/group"), GROUP).unwrap();
        dir
    }

    #[test]
    fn a_user_has_the_groups_that_name_it_and_its_own() {
        let root = root();
        let user = by_name(root.path(), "user").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.groups.as_slice()),
            (1000, 1001, [1001, 27, 100].as_slice())
        );
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/home/user", "/bin/zsh"));
        assert_eq!(by_uid(root.path(), 1000).unwrap(), user);
    }

    #[test]
    fn empty_fields_have_defaults_and_broken_lines_are_no_users() {
        let root = root();
        let user = by_name(root.path(), "bare").unwrap();
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/", "/bin/sh"));
        for name in ["", "bad", "broken line", "x", "user2", "user:x"] {
            assert!(
                matches!(by_name(root.path(), name), Err(UserError::Unknown(_))),
                "{name:?}"
            );
        }
    }

    #[test]
    fn numbers_have_the_name_of_their_first_line_or_none() {
        let root = root();
        let names = Names::read(root.path());
        assert_eq!((names.user(1000), names.user(7)), ("user".to_owned(), "7".to_owned()));
        assert_eq!(
            (names.group(27), names.group(0)),
            ("sudo".to_owned(), "root".to_owned())
        );
    }

    #[test]
    fn root_exists_even_where_no_file_does() {
        let empty = Dir::new("users-empty");
        assert_eq!(by_name(empty.path(), "root").unwrap(), superuser());
        assert!(by_name(empty.path(), "user").is_err());
    }
}
