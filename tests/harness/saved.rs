//! A container's image as `docker save` writes it, and a user who may do nothing on the host but call, and builds templates of it.

use std::fs::{self, File};
use std::process::{Command, Output};

use crate::disk::run;

/// Makes an archive as `docker save` does, of two layers: programs with their libraries, and changes to them. As root, so that files have the
/// owners and attributes that they are to have in the sandbox.
const SAVE: &str = r#"set -eu; umask 022; cd "$1"; machine=$2; mkdir -p one/srv two
for program in bash cat id "${@:3}"; do
    program=/usr/bin/$program
    for file in $program $(ldd $program | grep -o '/[^ ]*'); do mkdir -p one$(dirname $file); cp -L $file one$file; done
done
echo hidden > one/srv/hidden; echo first > one/srv/changed; echo linked > one/srv/name; ln one/srv/name one/srv/other
ln -s usr/bin one/bin; echo secret > one/srv/secret; chmod 600 one/srv/secret
cp one/usr/bin/id one/srv/suid; chown 1234:70000 one/srv/suid; chmod 4755 one/srv/suid
# Whoever runs this reads everything.
cp one/usr/bin/cat one/srv/reader
setcap cap_dac_read_search+ep one/srv/reader
mkdir two/srv two/bin; : > two/srv/.wh.hidden; echo second > two/srv/changed; echo by way of a link > two/bin/note
layer() { tar --xattrs --xattrs-include='*' --numeric-owner --format=pax -C $1 -cf $1.tar "${@:2}"; }
# Without an entry for bin itself, which would be a directory in place of the link.
layer one .; layer two srv bin/note
id() { sha256sum < $1 | cut -c-64; }
echo '{"architecture": "'$machine'", "os": "linux", "rootfs": {"diff_ids": ["sha256:'$(id one.tar)'", "sha256:'$(id two.tar)'"]}}' > config
config=$(id config).json; mv config $config
echo '[{"Config": "'$config'", "RepoTags": ["web:1"], "Layers": ["one.tar", "two.tar"]}]' > manifest.json
tar -cf web.tar $config one.tar two.tar manifest.json; rm -r $config manifest.json one two one.tar two.tar
mkdir work; roost pki client --days 1 roost-cli pki; chown -R nobody: ."#;

/// A directory of the user nobody, with the image as `web.tar` and a client's certificate in `pki`. It goes with this value.
#[derive(Debug)]
pub struct Saved(String);

impl Saved {
    /// The image has bash, cat, id and these programs of the host's, of which files in `/srv` tell what became of it.
    ///
    /// # Panics
    /// When it cannot be made, as where there is one already.
    pub fn new(programs: &[&str]) -> Self {
        let dir = "/var/tmp/roost-saved";
        fs::create_dir(dir).expect("made");
        let saved = Self(dir.to_owned());
        let machine = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        run("bash", &[&["-c", SAVE, "save", dir, machine], programs].concat());
        saved
    }

    /// Its path.
    pub fn path(&self) -> &str {
        &self.0
    }

    /// Runs `roost template build` in the directory, as that user and with `web.tar` on standard input.
    ///
    /// # Panics
    /// When it cannot be run at all, or has left something of what was on the way.
    pub fn build(&self, args: &[&str]) -> Output {
        let work = format!("{}/work", self.0);
        let output = Command::new("setpriv")
            .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--no-new-privs"])
            .args(["roost", "--pki", "pki", "template", "build"])
            .args(args)
            .env("TMPDIR", &work)
            .current_dir(&self.0)
            .stdin(File::open(format!("{}/web.tar", self.0)).expect("the image"))
            .output()
            .expect("setpriv runs");
        assert_eq!(fs::read_dir(&work).expect("read").count(), 0, "{output:?}");
        output
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}
