//! Which user and groups a container runs with: from the request, the image's `User`, and the image's own passwd and group files.

use std::path::Path;

use super::layers::Layers;
use crate::board::RunUser;
use crate::error::{Error, invalid};
use crate::spec::Security;

/// Larger passwd and group files are cut: no name of use is behind that.
const LIMIT: u64 = 4 << 20;

/// The result: ids, and the home folder of the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) user: RunUser,
    pub(crate) home: String,
}

/// Decides it. `image_user` is the image's `User` text. Blocking.
pub(crate) fn resolve(security: &Security, image_user: &str, layers: &Layers) -> Result<Resolved, Error> {
    let read = |path: &str| -> Result<String, Error> {
        let content = layers.read(Path::new(path), LIMIT).map_err(crate::error::file("read the image's", path))?;
        Ok(String::from_utf8_lossy(&content.unwrap_or_default()).into_owned())
    };
    decide(security, image_user, &read("/etc/passwd")?, &read("/etc/group")?)
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("");
        Some(Account { name, uid, gid, home })
    })
}

/// (name, gid, members)
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, std::str::Split<'_, char>)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("").split(',')))
    })
}

/// The pure part.
pub(crate) fn decide(security: &Security, image_user: &str, passwd: &str, group: &str) -> Result<Resolved, Error> {
    let by_uid = |uid: u32| accounts(passwd).find(|a| a.uid == uid);
    let by_name = |name: &str| accounts(passwd).find(|a| a.name == name);
    let mut image_group = "";
    let (uid, account) = if !security.run_as_username.is_empty() {
        named(&security.run_as_username, "run_as_username", &by_name, &by_uid)?
    } else if let Some(uid) = security.run_as_user {
        (uid, by_uid(uid))
    } else {
        let (user, tail) = image_user.split_once(':').unwrap_or((image_user, ""));
        image_group = tail;
        if user.is_empty() { (0, by_uid(0)) } else { named(user, "image user", &by_name, &by_uid)? }
    };
    let gid = match (security.run_as_group, image_group) {
        (Some(gid), _) => gid,
        (None, "") => account.as_ref().map_or(0, |a| a.gid),
        (None, text) => match text.parse() {
            Ok(gid) => gid,
            Err(_) => groups(group)
                .find(|(name, ..)| *name == text)
                .map(|(_, gid, _)| gid)
                .ok_or_else(|| invalid("image user", format!("the image has no group {text:?}")))?,
        },
    };
    let mut all = vec![gid];
    all.extend(&security.supplemental_groups);
    if !security.strict_groups
        && let Some(account) = &account
    {
        all.extend(groups(group).filter(|(_, _, members)| members.clone().any(|m| m == account.name)).map(|(_, gid, _)| gid));
    }
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|g| seen.insert(*g));
    let home = account.map(|a| a.home).filter(|h| !h.is_empty()).unwrap_or("/").to_owned();
    Ok(Resolved { user: RunUser { uid, gid, groups: all }, home })
}

fn named<'a>(
    text: &str,
    field: &'static str,
    by_name: &impl Fn(&str) -> Option<Account<'a>>,
    by_uid: &impl Fn(u32) -> Option<Account<'a>>,
) -> Result<(u32, Option<Account<'a>>), Error> {
    if let Some(account) = by_name(text) {
        return Ok((account.uid, Some(account)));
    }
    match text.parse::<u32>() {
        Ok(uid) => Ok((uid, by_uid(uid))),
        Err(_) => Err(invalid(field, format!("the image has no user {text:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:\ndefault-user:x:1000:1000::/home/d:/bin/sh\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww-data:x:33:\nin-image:x:50000:default-user,www-data\nusers:x:100:other\n";

    fn run(security: Security, image: &str) -> (u32, u32, Vec<u32>) {
        let got = decide(&security, image, PASSWD, GROUP).unwrap();
        (got.user.uid, got.user.gid, got.user.groups)
    }

    #[test]
    fn the_user_comes_from_the_request_then_from_the_image() {
        let s = Security::default;
        let cases = [
            (s(), "", (0, 0, vec![0])),
            (s(), "1002", (1002, 0, vec![0])),
            (s(), "www-data", (33, 33, vec![33, 50000])),
            (s(), "1003:1004", (1003, 1004, vec![1004])),
            (s(), "www-data:1004", (33, 1004, vec![1004, 50000])),
            (s(), "www-data:users", (33, 100, vec![100, 50000])),
            (Security { run_as_user: Some(1001), ..s() }, "www-data:5", (1001, 0, vec![0])),
            (Security { run_as_user: Some(1001), run_as_group: Some(1002), ..s() }, "", (1001, 1002, vec![1002])),
            (Security { run_as_username: "www-data".into(), ..s() }, "0", (33, 33, vec![33, 50000])),
            (Security { supplemental_groups: vec![1234], ..s() }, "1000", (1000, 1000, vec![1000, 1234, 50000])),
            (Security { supplemental_groups: vec![1234], strict_groups: true, ..s() }, "1000", (1000, 1000, vec![1000, 1234])),
            (Security { supplemental_groups: vec![0, 5, 5], ..s() }, "", (0, 0, vec![0, 5])),
        ];
        for (security, image, want) in cases {
            assert_eq!(run(security.clone(), image), want, "{image:?} {security:?}");
        }
    }

    #[test]
    fn unknown_names_are_errors() {
        let unknown = Security { run_as_username: "nobody-here".into(), ..Default::default() };
        assert!(decide(&unknown, "", PASSWD, GROUP).is_err());
        assert!(decide(&Security::default(), "ghost", PASSWD, GROUP).is_err());
        assert!(decide(&Security::default(), "www-data:ghosts", PASSWD, GROUP).is_err());
    }

    #[test]
    fn the_home_is_the_accounts() {
        assert_eq!(decide(&Security::default(), "www-data", PASSWD, GROUP).unwrap().home, "/var/www");
        assert_eq!(decide(&Security::default(), "4711", PASSWD, GROUP).unwrap().home, "/");
    }
}
