//! The ack gate: the one place where an answer to a front end leaves. Each answer states its grounds,
//! and they are checked here once more.

use base::{BlockReply, Buffer, RequestId, Seq, Status};

use crate::head::{Head, Output, Phase};

/// Why an answer may be given.
#[derive(Debug)]
pub(crate) enum Grounds {
    /// Record `seq` is at a write quorum.
    Written { seq: Seq },
    /// Every record through `target` is on media at a write quorum.
    Flushed { target: Seq },
    /// Verified data, in which nothing newer than record `seen` can show, and grants to show it.
    Read { data: Buffer, seen: Seq },
    /// Every copy is damaged, or the stall deadline passed.
    Failed,
    /// Not valid; nothing was done.
    Refused(Status),
}

impl Head {
    /// Answers a request.
    pub(crate) fn answer(&mut self, id: RequestId, grounds: Grounds) {
        let mut data = None;
        let status = match grounds {
            Grounds::Written { seq } => {
                let media = self.log.entry(seq).is_some_and(|entry| entry.media);
                assert!(self.serves(), "no acknowledgement before EpochStart is settled");
                assert!(seq <= self.log.commit(), "acknowledged records are settled");
                assert!(
                    self.sets.write_quorum_met(self.holders(seq, media)),
                    "an acknowledged record is at a write quorum"
                );
                Status::Ok
            }
            Grounds::Flushed { target } => {
                assert!(self.serves(), "no acknowledgement before EpochStart is settled");
                assert!(target <= self.log.durable, "flushed records are on media at a quorum");
                Status::Ok
            }
            Grounds::Read { data: bytes, seen } => {
                assert!(self.serves(), "no read before EpochStart is settled");
                assert!(seen <= self.log.commit(), "what a read shows is settled");
                assert!(self.trusted(), "no read while another head may be open");
                assert!(
                    !matches!(self.phase, Phase::Releasing { until: Some(_) }),
                    "no read once members may have been told of the release"
                );
                data = Some(bytes);
                Status::Ok
            }
            Grounds::Failed => Status::IoError,
            Grounds::Refused(status) => {
                assert!(status != Status::Ok && status != Status::Superseded);
                status
            }
        };
        self.outputs.push_back(Output::Reply(BlockReply { id, status, data }));
    }

    fn serves(&self) -> bool {
        let settled = self.log.start().is_some_and(|start| start <= self.log.commit());
        settled && matches!(self.phase, Phase::Serving | Phase::Releasing { .. })
    }
}
