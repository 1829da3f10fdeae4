//! What a worker gives up before it looks at its first byte from the network: the user it was started
//! as, every capability, and any way to get one back.

use std::ffi::CString;

use anyhow::{Context, Result, ensure};
use caps::{CapSet, Capability};
use culvert_shared::config::{Config, User};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, getegid, geteuid, getgid, getuid, initgroups, setgid, setuid};

use crate::retain;

/// The user that workers shall change to; `None` when they stay who they are. As with nginx, `user` is
/// without effect where the master lacks the right to change it; that is said once, in the log.
pub fn target_user(config: &Config) -> Option<User> {
    let user = config.user.as_ref()?;
    if already(user) {
        return None;
    }
    let Some(missing) = retain::missing(&[Capability::CAP_SETUID, Capability::CAP_SETGID]) else {
        return Some(user.clone());
    };
    log::warn!(
        "user = \"{}\" is ignored: the master lacks {missing}, workers run as uid {}; start it as root, give it \
         that, or leave `user` out",
        user.name,
        geteuid()
    );
    None
}

/// Whether the master changes its workers' user.
pub fn changes_user(config: &Config) -> bool {
    config.user.as_ref().is_some_and(|user| !already(user))
        && retain::missing(&[Capability::CAP_SETUID, Capability::CAP_SETGID]).is_none()
}

fn already(user: &User) -> bool {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    [getuid(), geteuid()] == [uid; 2] && [getgid(), getegid()] == [gid; 2]
}

/// Drops everything, in a freshly forked child.
///
/// # Errors
/// Something could not be dropped; the worker must not serve then.
pub fn drop_all(user: Option<&User>) -> Result<()> {
    if let Some(user) = user {
        let what = || format!("failed to take the groups of user \"{}\"", user.name);
        let name = CString::new(user.name.as_str()).with_context(what)?;
        let gid = Gid::from_raw(user.gid);
        initgroups(&name, gid).with_context(what)?;
        setgid(gid).with_context(what)?;
    }
    // Needs CAP_SETPCAP, so it comes before the user. Without that right the set stays, and
    // no_new_privs below is what keeps a program that is executed from gaining from it.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false) {
        caps::clear(None, CapSet::Bounding).context("failed to empty the capability bounding set")?;
    }
    if let Some(user) = user {
        setuid(Uid::from_raw(user.uid))
            .with_context(|| format!("failed to become user \"{}\"", user.name))?;
        ensure!(
            already(user),
            "still uid {} after becoming user \"{}\"",
            getuid(),
            user.name
        );
    }
    caps::clear(None, CapSet::Ambient).context("failed to drop the ambient capabilities")?;
    for set in [CapSet::Effective, CapSet::Inheritable, CapSet::Permitted] {
        caps::clear(None, set).with_context(|| format!("failed to drop the {set:?} capabilities"))?;
    }
    prctl::set_no_new_privs().context("failed to set no_new_privs")?;
    let left = caps::read(None, CapSet::Permitted).context("failed to read the capabilities")?;
    ensure!(
        left.is_empty(),
        "capabilities are left after all were dropped: {left:?}"
    );
    Ok(())
}
