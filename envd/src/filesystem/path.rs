//! Where a path of a caller leads.

use std::path::{Path, PathBuf};

use super::FileError;
use crate::users::User;

/// Resolves `path` for `user`: `~` and relative paths start at the user's home; an empty one is `workdir`, the sandbox's
/// default directory, or the home. `..` is left to the kernel, which knows where links lead.
///
/// # Errors
/// [`FileError::Path`].
pub(crate) fn resolve(path: &str, user: &User, workdir: Option<&str>) -> Result<PathBuf, FileError> {
    let path = if path.is_empty() {
        workdir.unwrap_or_default()
    } else {
        path
    };
    if path.contains('\0') {
        return Err(FileError::Path("holds a NUL byte"));
    }
    let home = Path::new("/").join(&user.home);
    let resolved = match path.strip_prefix('~') {
        Some("") => home,
        Some(rest) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        Some(_) => return Err(FileError::Path("names the home of another user")),
        None => home.join(path),
    };
    // Leaves out `.` and doubled slashes.
    Ok(resolved.components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_and_the_tilde_start_at_the_home() {
        let user = User {
            name: "user".to_owned(),
            uid: 1000,
            gid: 1000,
            groups: vec![],
            home: "/home/user".to_owned(),
            shell: "/bin/sh".to_owned(),
        };
        let at = |path, workdir| resolve(path, &user, workdir).map(|path| path.display().to_string());
        for (path, expected) in [
            ("a/b", "/home/user/a/b"),
            ("./a//b/", "/home/user/a/b"),
            ("~", "/home/user"),
            ("~//a", "/home/user/a"),
            ("/a/./b", "/a/b"),
            ("../x", "/home/user/../x"),
            ("", "/home/user"),
            ("a~", "/home/user/a~"),
        ] {
            assert_eq!(at(path, None).unwrap(), expected, "{path:?}");
        }
        assert_eq!(at("", Some("/work")).unwrap(), "/work");
        assert_eq!(at("", Some("work")).unwrap(), "/home/user/work");
        assert_eq!(at("a", Some("/work")).unwrap(), "/home/user/a");
        for bad in ["~other", "~other/a", "a\0b", "/\0"] {
            assert!(matches!(at(bad, None), Err(FileError::Path(_))), "{bad:?}");
        }
    }
}
