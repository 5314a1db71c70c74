//! Debian's cloud kernel, shared by the guest and the rig's host: the plain `vmlinux` (it boots faster than the bzImage
//! that unpacks itself, most of all under emulation) and the modules.
//!
//! ```text
//! target/rig/kernel-<key>/vmlinux
//! target/rig/kernel-<key>/version          6.1.0-NN-cloud-amd64
//! target/rig/kernel-<key>/usr/lib/modules/<version>/…
//! ```

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::cache;
use crate::debian::{RELEASE, Recipe};
use crate::step::quiet;

const RECIPE: Recipe<'_> = Recipe {
    release: RELEASE,
    variant: "extract",
    packages: &["linux-image-cloud-amd64"],
    extra: &[],
};

/// A kernel on disk.
pub(crate) struct Kernel {
    dir: PathBuf,
    /// As `uname -r` says it.
    pub(crate) version: String,
}

/// The kernel, made when missing.
pub(crate) fn ensure() -> Result<Kernel> {
    let dir = cache::artefact("kernel", RECIPE.key(), make)?;
    let version = fs::read_to_string(dir.join("version")).context("cannot read the kernel's version")?;
    Ok(Kernel { dir, version })
}

impl Kernel {
    /// The uncompressed ELF image with its PVH note.
    pub(crate) fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The folder to put below a root filesystem's `usr/lib/modules`.
    pub(crate) fn modules(&self) -> PathBuf {
        self.dir.join("usr/lib/modules").join(&self.version)
    }
}

fn make(dir: &Path) -> Result<()> {
    // Modules lie below /lib or, with a merged /usr, below /usr/lib.
    RECIPE.make_files(dir, &["./boot/vmlinuz-*", "./*lib/modules/*"])?;
    if dir.join("lib").is_dir() {
        fs::create_dir_all(dir.join("usr"))?;
        fs::rename(dir.join("lib"), dir.join("usr/lib"))?;
    }
    let mut kernels = fs::read_dir(dir.join("boot"))?;
    let kernel = kernels
        .next()
        .ok_or_else(|| anyhow!("the kernel package has no vmlinuz"))??;
    let name = kernel.file_name().to_string_lossy().into_owned();
    let version = name.strip_prefix("vmlinuz-").expect("tar was asked for vmlinuz-*");
    fs::write(dir.join("vmlinux"), unpack(&fs::read(kernel.path())?)?)?;
    fs::write(dir.join("version"), version)?;
    std::os::unix::fs::symlink("usr/lib", dir.join("lib"))?;
    quiet(Command::new("/sbin/depmod").arg("-b").arg(dir).arg(version))?;
    fs::remove_dir_all(dir.join("boot"))?;
    Ok(())
}

/// The ELF image inside a bzImage. Source: `Documentation/arch/x86/boot.rst` (setup_sects, payload_offset,
/// payload_length); the payload's last four bytes are its unpacked size and no part of the compressed stream.
fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image
            .get(at..at + 4)
            .ok_or_else(|| anyhow!("the kernel image ends too soon"))?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize)
    };
    ensure!(
        image.get(0x202..0x206) != Some(&[0; 4]) && word(0x202)? == 0x5372_6448,
        "not a bzImage"
    );
    let start = (usize::from(image[0x1f1]) + 1) * 512 + word(0x248)?;
    let payload = image
        .get(start..start + word(0x24c)? - 4)
        .ok_or_else(|| anyhow!("the payload lies outside"))?;
    let program = match payload {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        [0x1f, 0x8b, ..] => "gzip",
        _ => bail!("unknown compression of the kernel image"),
    };
    let elf = filter(program, payload)?;
    ensure!(elf.starts_with(b"\x7fELF"), "the kernel's payload is no ELF image");
    ensure!(has_pvh_entry(&elf), "the kernel has no PVH entry point (CONFIG_PVH)");
    Ok(elf)
}

fn filter(program: &str, input: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input));
        let output = child.wait_with_output()?;
        // The unpacker may stop reading before the padding behind its stream.
        drop(writer.join().expect("the writer does not panic"));
        ensure!(output.status.success(), "{program}: {}", output.status);
        Ok(output.stdout)
    })
}

/// Whether the image carries the ELF note (owner `Xen`, type 18, XEN_ELFNOTE_PHYS32_ENTRY) that direct boot needs.
fn has_pvh_entry(elf: &[u8]) -> bool {
    let note: Vec<u8> = [4u32, 4, 18]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .chain(*b"Xen\0")
        .collect();
    let wide: Vec<u8> = [4u32, 8, 18]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .chain(*b"Xen\0")
        .collect();
    elf.windows(note.len()).any(|window| window == note || window == wide)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_else_than_a_bzimage_is_refused() {
        assert!(unpack(&[0; 100]).is_err());
        assert!(unpack(&[0; 0x1000]).is_err());
    }
}
