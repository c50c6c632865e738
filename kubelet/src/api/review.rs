//! Asks the API server whose token it is and who may do what, as this node. Remembers nothing: the guard does.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec, SubjectAccessReviewStatus,
};
use kube::Client;
use kube::api::{Api, PostParams};

use crate::auth::{Attributes, Review, ReviewError, Reviewer, User};

/// The reviewer by the API server's own reviews.
pub struct ApiReviewer {
    client: Client,
}

impl std::fmt::Debug for ApiReviewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiReviewer")
    }
}

impl ApiReviewer {
    /// Asks with the node's client.
    pub fn new(client: Client) -> ApiReviewer {
        ApiReviewer { client }
    }
}

/// What the API server refuses is refused the next time too, but for want of time.
fn failed(error: kube::Error) -> ReviewError {
    match &error {
        kube::Error::Api(status) if (400..500).contains(&status.code) && !matches!(status.code, 408 | 429) => {
            ReviewError::Refused(error.to_string())
        }
        _ => ReviewError::NoAnswer(error.to_string()),
    }
}

impl Reviewer for ApiReviewer {
    fn token<'a>(&'a self, token: &'a str) -> Review<'a, Option<User>> {
        Box::pin(async move {
            let spec = TokenReviewSpec { token: token.to_owned(), ..TokenReviewSpec::default() };
            let review = TokenReview { spec, ..TokenReview::default() };
            let answer = Api::<TokenReview>::all(self.client.clone()).create(&PostParams::default(), &review).await;
            user_of(answer.map_err(failed)?.status.unwrap_or_default())
        })
    }

    fn access<'a>(&'a self, user: &'a User, wanted: &'a Attributes) -> Review<'a, bool> {
        Box::pin(async move {
            let review = SubjectAccessReview { spec: question(user, wanted), ..SubjectAccessReview::default() };
            let answer = Api::<SubjectAccessReview>::all(self.client.clone()).create(&PostParams::default(), &review).await;
            Ok(may(&answer.map_err(failed)?.status.unwrap_or_default()))
        })
    }
}

/// Whether nobody has said no and somebody yes. That an authorizer could not answer (`evaluationError`) is no other answer, as upstream:
/// the others have answered, and asking again would cost the same each time.
fn may(status: &SubjectAccessReviewStatus) -> bool {
    if let Some(error) = status.evaluation_error.as_ref().filter(|_| !status.allowed) {
        tracing::debug!(error, "an authorizer could not answer");
    }
    status.allowed && !status.denied.unwrap_or(false)
}

fn user_of(status: TokenReviewStatus) -> Result<Option<User>, ReviewError> {
    if !status.authenticated.unwrap_or(false) {
        // A wrong token comes with an error too: it is nobody's, and that is an answer.
        return Ok(None);
    }
    let user = status.user.unwrap_or_default();
    Ok(Some(User {
        name: user.username.unwrap_or_default(),
        uid: user.uid.unwrap_or_default(),
        groups: user.groups.unwrap_or_default(),
        extra: user.extra.unwrap_or_default(),
    }))
}

fn question(user: &User, wanted: &Attributes) -> SubjectAccessReviewSpec {
    SubjectAccessReviewSpec {
        user: Some(user.name.clone()),
        uid: Some(user.uid.clone()).filter(|uid| !uid.is_empty()),
        groups: Some(user.groups.clone()),
        extra: Some(user.extra.clone()).filter(|extra| !extra.is_empty()),
        resource_attributes: Some(ResourceAttributes {
            verb: Some(wanted.verb.to_owned()),
            version: Some("v1".to_owned()),
            resource: Some("nodes".to_owned()),
            subresource: Some(wanted.subresource.to_owned()),
            name: Some(wanted.node.clone()),
            ..ResourceAttributes::default()
        }),
        non_resource_attributes: None,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;
    use crate::api::node::fake::{calls, server};

    #[test]
    fn a_token_of_nobody_is_an_answer() {
        let user = UserInfo { username: Some("system:serviceaccount:a:b".into()), ..UserInfo::default() };
        let status = TokenReviewStatus { authenticated: Some(true), user: Some(user), ..TokenReviewStatus::default() };
        assert_eq!(user_of(status.clone()).unwrap().unwrap().name, "system:serviceaccount:a:b");
        let wrong = TokenReviewStatus { authenticated: Some(false), error: Some("expired".into()), ..status };
        assert_eq!(user_of(wrong).unwrap(), None);
    }

    #[tokio::test]
    async fn what_the_server_refuses_is_told_from_what_it_may_answer_later() {
        for (code, refused) in [(401, true), (403, true), (429, false), (500, false), (503, false)] {
            let said = serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "x", "code": code});
            let (client, _) = server(vec![(code, said)]);
            let error = ApiReviewer::new(client).token("t").await.unwrap_err();
            assert_eq!(matches!(error, ReviewError::Refused(_)), refused, "{code}: {error:?}");
        }
    }

    #[tokio::test]
    async fn a_refusal_beside_an_error_is_a_refusal_and_asked_for_once() {
        let error = "role.rbac.authorization.k8s.io \"x\" not found";
        for (status, expected) in [
            (serde_json::json!({"allowed": true}), true),
            (serde_json::json!({"allowed": true, "evaluationError": error}), true),
            (serde_json::json!({"allowed": true, "denied": true}), false),
            (serde_json::json!({"allowed": false}), false),
            (serde_json::json!({"allowed": false, "denied": true}), false),
            (serde_json::json!({"allowed": false, "evaluationError": error}), false),
        ] {
            let (client, asked) = server(vec![(201, serde_json::json!({"spec": {}, "status": status}))]);
            let wanted = Attributes { verb: "get", node: "n1".into(), subresource: "stats" };
            let reviewer = ApiReviewer::new(client);
            assert_eq!(reviewer.access(&User::default(), &wanted).await.unwrap(), expected, "{status}");
            assert_eq!(calls(&asked).len(), 1);
        }
    }

    #[test]
    fn the_question_is_about_this_node() {
        let user = User { name: "metrics".into(), groups: vec!["g".into()], ..User::default() };
        let wanted = Attributes { verb: "get", node: "n1".into(), subresource: "stats" };
        let asked = serde_json::to_value(question(&user, &wanted)).unwrap();
        let expected = serde_json::json!({"user": "metrics", "groups": ["g"], "resourceAttributes":
            {"verb": "get", "version": "v1", "resource": "nodes", "subresource": "stats", "name": "n1"}});
        assert_eq!(asked, expected);
    }

    fn reviewed(kind: &str, group: &str, status: &serde_json::Value) -> (u16, serde_json::Value) {
        let answer = serde_json::json!({"kind": kind, "apiVersion": group, "metadata": {}, "spec": {}, "status": status});
        (201, answer)
    }

    #[tokio::test]
    async fn tokens_and_permissions_are_asked_of_the_api_server() {
        let token = |status| reviewed("TokenReview", "authentication.k8s.io/v1", &status);
        let access = |status| reviewed("SubjectAccessReview", "authorization.k8s.io/v1", &status);
        let failure =
            serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "away", "code": 500});
        let (client, asked) = server(vec![
            token(serde_json::json!({"authenticated": true, "user": {"username": "u", "groups": ["g"], "extra": {"k": ["v"]}}})),
            token(serde_json::json!({"error": "expired"})),
            (500, failure.clone()),
            access(serde_json::json!({"allowed": true, "evaluationError": "of another authorizer"})),
            access(serde_json::json!({"allowed": false, "denied": true, "evaluationError": "no"})),
            access(serde_json::json!({"allowed": false, "evaluationError": "the role is gone"})),
            (500, failure),
        ]);
        let reviewer = ApiReviewer::new(client);
        let user = reviewer.token("good").await.unwrap().unwrap();
        assert_eq!((user.name.as_str(), user.groups.len(), user.extra["k"].len()), ("u", 1, 1));
        assert_eq!(reviewer.token("old").await.unwrap(), None, "nobody's is an answer");
        assert!(reviewer.token("any").await.is_err(), "no answer is none");
        let wanted = Attributes { verb: "get", node: "n1".into(), subresource: "stats" };
        assert!(reviewer.access(&user, &wanted).await.unwrap());
        assert!(!reviewer.access(&user, &wanted).await.unwrap());
        assert!(!reviewer.access(&user, &wanted).await.unwrap());
        assert!(reviewer.access(&user, &wanted).await.is_err());
        let asked = calls(&asked);
        assert_eq!(asked.iter().filter(|a| *a == "POST /apis/authentication.k8s.io/v1/tokenreviews").count(), 3);
        assert_eq!(asked.iter().filter(|a| *a == "POST /apis/authorization.k8s.io/v1/subjectaccessreviews").count(), 4);
    }
}
