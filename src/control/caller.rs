//! Who calls, what they may, and whose checkpoints they see.
//!
//! Who is at the other end is told by the kernel (the Unix socket) or by a certificate (TCP), never by the request. The operator's lists
//! ([`Roles`]) give it a role; who is in none is not answered. What each method needs is one table ([`right_of`]), and what is not in
//! it needs everything.
//!
//! | role | may |
//! |---|---|
//! | reader | look at everything |
//! | tenant | look at, make and remove what is its own; its certificate's name is the owner |
//! | scheduler | all that, for every owner, and command jobs |
//! | operator | all that, and this host: pins, evictions, scrubs, draining |
//!
//! A scheduler says for whom it asks in the metadata `ckptd-owner` of a call (percent-encoded UTF-8). The call is then **confined** as one of
//! that owner's would be: other owners' checkpoints, jobs, events and counts are as if they were not there, public ones are seen and cannot
//! be changed, and no figure depends on what others have. A tenant's calls are always confined. Without the statement a scheduler speaks for
//! the host and sees everything.

use tonic::{Extensions, Request};

use crate::catalog::checkpoints::{Record, Seen};
use crate::error::{Error, NO_ROOM, NO_ROOM_REMEDY, Result};
use crate::names::OwnerId;

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this host.
    Process {
        /// Its user.
        uid: u32,
        /// Its groups, the supplementary ones too.
        gids: Vec<u32>,
    },
    /// Whoever has the key of a certificate, by the certificate's DNS and URI names.
    Certificate(Vec<String>),
}

/// Somebody whom a list names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// `uid:N`.
    User(u32),
    /// `gid:N`.
    Group(u32),
    /// `name:NAME`, of a certificate.
    Certificate(String),
    /// `name:*`: every certificate.
    AnyCertificate,
}

impl std::str::FromStr for Named {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid("BAD_PEER", format!("`{text}` names nobody"))
                .remedy("write `uid:N`, `gid:N`, or `name:NAME` of a certificate (`name:*`: every one)")
        };
        let (kind, rest) = text.split_once(':').ok_or_else(wrong)?;
        match (kind, rest) {
            ("uid", number) => number.parse().map(Self::User).map_err(|_| wrong()),
            ("gid", number) => number.parse().map(Self::Group).map_err(|_| wrong()),
            ("name", "*") => Ok(Self::AnyCertificate),
            ("name", name) if !name.is_empty() => Ok(Self::Certificate(name.to_owned())),
            _ => Err(wrong()),
        }
    }
}

impl Named {
    /// Whether it is `peer`, and under which name.
    fn is(&self, peer: &Peer) -> Option<String> {
        match (self, peer) {
            (Self::User(named), Peer::Process { uid, .. }) if named == uid => Some(user(*uid)),
            (Self::Group(named), Peer::Process { uid, gids }) if gids.contains(named) => Some(user(*uid)),
            (Self::Certificate(named), Peer::Certificate(names)) => names.iter().find(|name| *name == named).cloned(),
            (Self::AnyCertificate, Peer::Certificate(names)) => names.first().cloned(),
            _ => None,
        }
    }
}

fn user(uid: u32) -> String {
    format!("uid:{uid}")
}

/// What a caller is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Looks.
    Reader,
    /// Has its own.
    Tenant,
    /// Commands jobs, for every owner.
    Scheduler,
    /// Commands the host.
    Operator,
}

/// What a method needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Nothing: health and reflection.
    Open,
    /// To look.
    Look,
    /// To make and change checkpoints.
    Own,
    /// To command jobs.
    Schedule,
    /// To command the host.
    Operate,
}

impl Role {
    const fn may(self, right: Right) -> bool {
        match right {
            Right::Open | Right::Look => true,
            Right::Own => matches!(self, Self::Tenant | Self::Scheduler | Self::Operator),
            Right::Schedule => matches!(self, Self::Scheduler | Self::Operator),
            Right::Operate => matches!(self, Self::Operator),
        }
    }
}

/// Every method that does not command the host, and what it needs.
const RIGHTS: &[(&str, Right)] = &[
    ("/ckptd.v1.Checkpoints/CreateCheckpoint", Right::Own),
    ("/ckptd.v1.Checkpoints/GetCheckpoint", Right::Look),
    ("/ckptd.v1.Checkpoints/ListCheckpoints", Right::Look),
    ("/ckptd.v1.Checkpoints/WatchCheckpoints", Right::Look),
    ("/ckptd.v1.Checkpoints/RetryCheckpoint", Right::Own),
    ("/ckptd.v1.Checkpoints/RenameCheckpoint", Right::Own),
    ("/ckptd.v1.Checkpoints/RemoveCheckpoint", Right::Own),
    ("/ckptd.v1.Checkpoints/PrefetchCheckpoint", Right::Own),
    ("/ckptd.v1.Checkpoints/EstimateCheckpoint", Right::Look),
    ("/ckptd.v1.Checkpoints/UploadCheckpoint", Right::Own),
    // It can end another's sending.
    ("/ckptd.v1.Checkpoints/GetUpload", Right::Own),
    // It reads directories of this host.
    ("/ckptd.v1.Checkpoints/CaptureOutput", Right::Schedule),
    ("/ckptd.v1.Checkpoints/ListCatalog", Right::Look),
    ("/ckptd.v1.Jobs/ReserveCheckpoints", Right::Schedule),
    ("/ckptd.v1.Jobs/AttachCheckpoints", Right::Schedule),
    ("/ckptd.v1.Jobs/RenewLease", Right::Schedule),
    ("/ckptd.v1.Jobs/DetachCheckpoints", Right::Schedule),
    ("/ckptd.v1.Jobs/ReleaseJob", Right::Schedule),
    ("/ckptd.v1.Jobs/GetJob", Right::Look),
    ("/ckptd.v1.Jobs/ListJobs", Right::Look),
    ("/ckptd.v1.Node/GetStatus", Right::Look),
    ("/ckptd.v1.Node/GetUsage", Right::Look),
    ("/ckptd.v1.Node/WatchEvents", Right::Look),
];

/// Services that say nothing of checkpoints.
const OPEN_SERVICES: &[&str] =
    &["/grpc.health.v1.Health/", "/grpc.reflection.v1.ServerReflection/", "/grpc.reflection.v1alpha.ServerReflection/"];

/// What the method at `path` needs.
pub(super) fn right_of(path: &str) -> Right {
    if OPEN_SERVICES.iter().any(|service| path.starts_with(service)) {
        return Right::Open;
    }
    RIGHTS.iter().find(|(method, _)| *method == path).map_or(Right::Operate, |(_, right)| *right)
}

/// Who has which role. Root and the daemon's own user are operators in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// Operators.
    pub operators: Vec<Named>,
    /// Schedulers.
    pub schedulers: Vec<Named>,
    /// Tenants: certificates only.
    pub tenants: Vec<Named>,
    /// Readers.
    pub readers: Vec<Named>,
}

impl Roles {
    /// Who `peer` is: the first list that names it, from the strongest role on; a tenant is confined to its name.
    ///
    /// # Errors
    /// `CALLER_REFUSED`.
    pub(super) fn caller(&self, peer: &Peer) -> Result<Caller> {
        if let Peer::Process { uid, .. } = peer
            && (*uid == 0 || *uid == nix::unistd::geteuid().as_raw())
        {
            return Ok(Caller { name: user(*uid), role: Role::Operator, owner: None });
        }
        let lists = [
            (Role::Operator, &self.operators),
            (Role::Scheduler, &self.schedulers),
            (Role::Tenant, &self.tenants),
            (Role::Reader, &self.readers),
        ];
        for (role, list) in lists {
            if let Some(name) = list.iter().find_map(|named| named.is(peer)) {
                let owner = (role == Role::Tenant).then(|| OwnerId::new(name.clone())).transpose()?;
                return Ok(Caller { name, role, owner: owner.map(|owner| owner.to_string()) });
            }
        }
        let who = match peer {
            Peer::Process { uid, .. } => format!("the user {uid}"),
            Peer::Certificate(names) => format!("the certificate of {}", names.join(", ")),
        };
        Err(Error::denied("CALLER_REFUSED", format!("{who} may not command ckptd"))
            .remedy("call as root, or be named in `access` of its configuration"))
    }

    /// Whether processes other than root's may call.
    pub fn name_others(&self) -> bool {
        let lists = [&self.operators, &self.schedulers, &self.tenants, &self.readers];
        lists.iter().any(|list| list.iter().any(|named| matches!(named, Named::User(_) | Named::Group(_))))
    }
}

/// Who makes a call, for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// By what it is known: `uid:N`, or a name of its certificate.
    pub(super) name: String,
    /// What it is to us.
    pub(super) role: Role,
    /// The owner it is confined to.
    pub(super) owner: Option<String>,
}

impl Caller {
    /// The caller of a request that was let in.
    ///
    /// # Errors
    /// Internal: it was not.
    pub(super) fn of<T>(request: &Request<T>) -> Result<Self> {
        Self::among(request.extensions())
    }

    fn among(extensions: &Extensions) -> Result<Self> {
        extensions.get::<Self>().cloned().ok_or_else(|| Error::internal("a call was let in without its caller"))
    }

    /// The same caller, asking for the owner that it states (percent-encoded, as metadata are ASCII).
    ///
    /// # Errors
    /// `BAD_OWNER`; `NOT_YOURS` for a tenant who states another.
    pub(super) fn stating(self, stated: &[u8]) -> Result<Self> {
        let decoded = percent_encoding::percent_decode(stated).decode_utf8();
        let text =
            decoded.map_err(|error| Error::invalid("BAD_OWNER", "the stated owner is no UTF-8").because(error))?;
        let owner = OwnerId::new(text.into_owned())?.to_string();
        match &self.owner {
            Some(own) if *own != owner => Err(not_yours("asking for another owner")),
            _ => Ok(Self { owner: Some(owner), ..self }),
        }
    }

    /// # Errors
    /// `CALLER_REFUSED`.
    pub(super) fn check(&self, right: Right) -> Result<()> {
        if self.role.may(right) {
            return Ok(());
        }
        let who = match self.role {
            Role::Reader => "a reader",
            Role::Tenant => "a tenant",
            Role::Scheduler => "a scheduler",
            Role::Operator => "an operator",
        };
        Err(Error::denied("CALLER_REFUSED", format!("{} is {who} here and may not do this", self.name))
            .remedy("ask an operator of this host"))
    }

    /// Whether it may change checkpoints at all.
    pub(super) fn may_own(&self) -> bool {
        self.role.may(Right::Own)
    }

    /// Whose checkpoints it sees.
    pub(super) fn sees(&self) -> Seen {
        self.owner.as_ref().map_or(Seen::Everything, |owner| Seen::By(owner.clone()))
    }

    /// Whether a record of this owner is among what it sees as its own.
    pub(super) fn is_owner(&self, owner: &str) -> bool {
        self.owner.as_ref().is_none_or(|own| own == owner)
    }

    /// The owner of what a request makes.
    ///
    /// # Errors
    /// `NOT_YOURS` where a confined caller names another, or makes something public.
    pub(super) fn owner_of_new(&self, asked: String, public: bool) -> Result<String> {
        match &self.owner {
            None => Ok(asked),
            Some(_) if public => Err(not_yours("making a public checkpoint")),
            Some(own) if asked.is_empty() || asked == *own => Ok(own.clone()),
            Some(_) => Err(not_yours("making a checkpoint of another owner")),
        }
    }

    /// An error as the caller may know it: how much room the host has is not for a confined one, since it would tell what others have.
    pub(super) fn may_know(&self, error: Error) -> Error {
        if self.owner.is_some() && error.tells_of_the_host() {
            return Error::new(error.kind(), error.reason(), NO_ROOM).remedy(NO_ROOM_REMEDY);
        }
        error
    }

    /// # Errors
    /// `NOT_YOURS` for a record that a confined caller sees because it is public.
    pub(super) fn check_owns(&self, record: &Record) -> Result<()> {
        if self.is_owner(&record.owner) && (self.owner.is_none() || !record.public) {
            return Ok(());
        }
        Err(not_yours(&format!("changing the public checkpoint `{}`", record.name)))
    }
}

pub(super) fn not_yours(doing: &str) -> Error {
    Error::denied("NOT_YOURS", format!("{doing} is not the caller's to do")).remedy("ask an operator of this host")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire;

    fn roles() -> Roles {
        let named = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Roles {
            operators: named(&["name:ops.example"]),
            schedulers: named(&["gid:990", "name:sched.example"]),
            tenants: named(&["name:team-a"]),
            readers: named(&["uid:7", "name:*"]),
        }
    }

    fn process(uid: u32, gids: &[u32]) -> Peer {
        Peer::Process { uid, gids: gids.to_vec() }
    }

    fn certificate(names: &[&str]) -> Peer {
        Peer::Certificate(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn the_strongest_list_that_names_a_peer_decides() {
        for (peer, role, name, owner) in [
            (process(0, &[0]), Role::Operator, "uid:0", None),
            (process(7, &[7]), Role::Reader, "uid:7", None),
            (process(7, &[7, 990]), Role::Scheduler, "uid:7", None),
            (certificate(&["team-a"]), Role::Tenant, "team-a", Some("team-a")),
            (certificate(&["x", "ops.example"]), Role::Operator, "ops.example", None),
            (certificate(&["other"]), Role::Reader, "other", None),
        ] {
            let caller = roles().caller(&peer).unwrap();
            assert_eq!((caller.role, caller.name.as_str(), caller.owner.as_deref()), (role, name, owner), "{peer:?}");
        }
        assert_eq!(roles().caller(&process(8, &[8])).unwrap_err().reason(), "CALLER_REFUSED");
        assert_eq!(Roles::default().caller(&certificate(&["x"])).unwrap_err().reason(), "CALLER_REFUSED");
    }

    #[test]
    fn a_statement_confines_and_a_tenant_can_state_only_itself() {
        let scheduler = Caller { name: "s".into(), role: Role::Scheduler, owner: None };
        assert_eq!(scheduler.sees(), Seen::Everything);
        let for_team = scheduler.clone().stating("t%C3%A9am".as_bytes()).unwrap();
        assert_eq!(for_team.sees(), Seen::By("téam".into()));
        assert_eq!(for_team.owner_of_new(String::new(), false).unwrap(), "téam");
        assert_eq!(for_team.owner_of_new("other".into(), false).unwrap_err().reason(), "NOT_YOURS");
        assert_eq!(for_team.owner_of_new(String::new(), true).unwrap_err().reason(), "NOT_YOURS");
        assert_eq!(scheduler.stating(b"a%0Ab").unwrap_err().reason(), "BAD_OWNER");
        let tenant = Caller { name: "a".into(), role: Role::Tenant, owner: Some("a".into()) };
        assert!(tenant.clone().stating(b"a").is_ok());
        assert_eq!(tenant.stating(b"b").unwrap_err().reason(), "NOT_YOURS");
    }

    #[test]
    fn roles_grow() {
        let rights = [Right::Open, Right::Look, Right::Own, Right::Schedule, Right::Operate];
        for (role, count) in [(Role::Reader, 2), (Role::Tenant, 3), (Role::Scheduler, 4), (Role::Operator, 5)] {
            assert_eq!(rights.iter().filter(|right| role.may(**right)).count(), count, "{role:?}");
        }
        assert_eq!(right_of("/ckptd.v1.Node/Drain"), Right::Operate);
        assert_eq!(right_of("/ckptd.v1.Anything/New"), Right::Operate);
        assert_eq!(right_of("/grpc.health.v1.Health/Check"), Right::Open);
    }

    #[test]
    fn the_table_names_methods_that_there_are() {
        use prost::Message as _;
        let described = prost_types::FileDescriptorSet::decode(wire::DESCRIPTORS).unwrap();
        let methods: Vec<_> = described
            .file
            .iter()
            .flat_map(|file| file.service.iter().map(move |service| (file.package(), service)))
            .flat_map(|(package, service)| {
                let path = |method: &prost_types::MethodDescriptorProto| {
                    format!("/{package}.{}/{}", service.name(), method.name())
                };
                service.method.iter().map(path).collect::<Vec<_>>()
            })
            .collect();
        for (method, _) in RIGHTS {
            assert!(methods.iter().any(|known| known == method), "{method}");
        }
    }
}
