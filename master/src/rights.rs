//! What a worker gives up before it looks at its first byte from the network: the user it was started
//! as, every capability but the one that a transparent `proxy_bind` needs, and any way to get one back.

use std::ffi::CString;

use anyhow::{Context, Result, bail, ensure};
use caps::{CapSet, Capability, CapsHashSet};
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

/// The one right that a worker may keep: with it, a socket is bound to an address that is not this host's
/// (`IP_TRANSPARENT`). What else it is good for, raw sockets, is out of a confined worker's reach.
const TRANSPARENT: Capability = Capability::CAP_NET_RAW;

/// Whether workers keep that right.
pub fn is_transparent(config: &Config) -> bool {
    let mut streams = config.servers.iter().map(|server| &server.stream);
    streams.any(|stream| stream.proxy_bind.is_transparent())
}

/// Whether workers can be given what the configuration needs.
///
/// # Errors
/// The master lacks a right that it would have to give them.
pub fn check(config: &Config) -> Result<()> {
    match retain::missing(&[TRANSPARENT]) {
        Some(missing) if is_transparent(config) => bail!(
            "proxy_bind is transparent, which the master lacks {missing} for: give it that (root has it, a systemd \
             unit gives it by AmbientCapabilities=), or take \"transparent\" out"
        ),
        _ => Ok(()),
    }
}

/// Drops everything, in a freshly forked child; with `transparent`, all but the right to be that.
///
/// # Errors
/// Something could not be dropped; the worker must not serve then.
pub fn drop_all(user: Option<&User>, transparent: bool) -> Result<()> {
    let kept: CapsHashSet = transparent.then_some(TRANSPARENT).into_iter().collect();
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
    if transparent {
        prctl::set_keepcaps(true).context("failed to keep rights across the change of the user")?;
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
    caps::clear(None, CapSet::Inheritable).context("failed to drop the inheritable capabilities")?;
    // What is effective has to be permitted, so it goes first. Changing the user has emptied it.
    for (set, left) in [
        (CapSet::Effective, &CapsHashSet::new()),
        (CapSet::Permitted, &kept),
        (CapSet::Effective, &kept),
    ] {
        caps::set(None, set, left).with_context(|| format!("failed to drop the {set:?} capabilities"))?;
    }
    prctl::set_no_new_privs().context("failed to set no_new_privs")?;
    let left = caps::read(None, CapSet::Permitted).context("failed to read the capabilities")?;
    ensure!(
        left == kept,
        "capabilities are left after all were dropped: {left:?}"
    );
    Ok(())
}
