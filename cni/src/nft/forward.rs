//! Passing a host that forwards nothing by default (`iptables -P FORWARD DROP`, which Docker sets).
//!
//! A packet must pass every base chain: accepting it in our own table does not help. So where iptables' FORWARD chain drops by
//! default, two rules go to its head: what comes from our bridge passes, and what goes to it passes if it answers or was sent to a host
//! port. They are written as iptables writes its own, so that it lists them, and marked with our table's name. Only tables of
//! iptables-nft can be seen from here: beside the legacy iptables the owner of the host has to add the two rules.

use std::collections::BTreeSet;

use super::expression::Rule;
use super::message::{
    GET_CHAIN, GET_RULE, NEW_CHAIN, NEW_RULE, commit, delete_rule_in, get_in, insert_rule_in, is_absent, parse,
};
use super::table::is_loss;
use crate::netlink::attributes::{as_string, find};
use crate::netlink::{Attributes, Request, Socket};
use crate::{Error, Result};

const TABLE: &str = "filter";
const CHAIN: &str = "FORWARD";
/// IPv4 and IPv6.
const FAMILIES: [u8; 2] = [2, 10];
const DROP: u32 = 0;
/// The kind of a rule's user data that nft prints as its comment.
const COMMENT: u8 = 0;

fn chain() -> Attributes {
    Attributes::new().string(1, TABLE).string(2, CHAIN)
}

/// Adds the rules that are missing where the chain drops by default.
pub(crate) fn ensure_forward(socket: &mut Socket, owner: &str, bridges: &BTreeSet<String>) -> Result<()> {
    if bridges.is_empty() {
        return Ok(());
    }
    for family in FAMILIES {
        if !drops(socket, family)? {
            continue;
        }
        let present: BTreeSet<String> = rules(socket, family)?.into_iter().map(|(comment, _)| comment).collect();
        let wanted = bridges.iter().flat_map(|bridge| {
            [
                (format!("{owner} to {bridge}"), Rule::new().to(bridge).known_or_dnat().accept()),
                (format!("{owner} from {bridge}"), Rule::new().from(bridge).accept()),
            ]
        });
        let missing: Vec<Request> = wanted
            .filter(|(comment, _)| !present.contains(comment))
            .map(|(comment, rule)| insert_rule_in(family, &chain().nest(4, rule.attributes()).bytes(7, &user_data(&comment))))
            .collect();
        if !missing.is_empty() {
            commit(socket, missing).map_err(|f| Error::netlink("add rules to", format!("{TABLE} {CHAIN}"))(f.error))?;
        }
    }
    Ok(())
}

/// Takes our rules out again.
pub(crate) fn remove_forward(socket: &mut Socket, owner: &str) -> Result<()> {
    let prefix = format!("{owner} ");
    for family in FAMILIES {
        let ours = rules(socket, family)?.into_iter().filter(|(comment, _)| comment.starts_with(&prefix));
        let requests: Vec<Request> = ours.map(|(_, handle)| delete_rule_in(family, &chain().bytes(3, &handle))).collect();
        if !requests.is_empty() {
            commit(socket, requests).map_err(|f| Error::netlink("delete rules of", format!("{TABLE} {CHAIN}"))(f.error))?;
        }
    }
    Ok(())
}

fn user_data(comment: &str) -> Vec<u8> {
    // Two names of links or tables and a word: far below 255 bytes.
    let mut data = vec![COMMENT, comment.len() as u8 + 1];
    data.extend_from_slice(comment.as_bytes());
    data.push(0);
    data
}

/// Whether there is such a chain and its policy is to drop.
fn drops(socket: &mut Socket, family: u8) -> Result<bool> {
    match socket.get(get_in(family, GET_CHAIN, &Attributes::new().string(1, TABLE).string(3, CHAIN))) {
        Ok(reply) => Ok(reply.as_ref().and_then(parse).is_some_and(|(kind, body)| {
            let policy = find(body, 5).and_then(|p| p.try_into().ok()).map(u32::from_be_bytes);
            kind == NEW_CHAIN && policy == Some(DROP)
        })),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(Error::netlink("look at", format!("{TABLE} {CHAIN}"))(error)),
    }
}

/// The chain's rules that have a comment: the comment and the handle.
fn rules(socket: &mut Socket, family: u8) -> Result<Vec<(String, Vec<u8>)>> {
    let mut request = get_in(family, GET_RULE, &chain());
    request.flags = 0;
    let messages = match socket.dump(request) {
        Ok(messages) => messages,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(Error::netlink("list rules of", format!("{TABLE} {CHAIN}"))(error)),
    };
    let rule = |body: &[u8]| {
        let is_here =
            find(body, 1).map(as_string).as_deref() == Some(TABLE) && find(body, 2).map(as_string).as_deref() == Some(CHAIN);
        let data = find(body, 7).filter(|data| is_here && data.first() == Some(&COMMENT))?;
        Some((as_string(data.get(2..)?), find(body, 3)?.to_vec()))
    };
    Ok(messages.iter().filter_map(parse).filter(|(kind, _)| *kind == NEW_RULE).filter_map(|(_, body)| rule(body)).collect())
}

/// Whether an event may have changed what this file looks at.
pub(super) fn concerns(table: &str, kind: u8) -> bool {
    table == TABLE && (kind == NEW_CHAIN || is_loss(kind))
}
