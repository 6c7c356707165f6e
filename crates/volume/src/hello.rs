//! Who comes, and why: said to a member after each Seal, for its server's logs and events.

use base::{CommandBody, HelloReason, ReplicaError};

use crate::head::Head;
use crate::sessions::Answer;
use crate::tag::Kind;

impl Head {
    /// A member has sealed this epoch: says why this session was begun.
    pub(crate) fn say_hello(&mut self, index: usize) {
        let reason: HelloReason = self.members[index].health.hello;
        let acknowledged = self.log.commit();
        let number = self.next_number();
        self.send(index, Kind::Hello, number, CommandBody::Hello { reason, acknowledged });
    }

    /// Nothing hangs on the answer, but a member that no longer obeys is to be sealed anew.
    pub(crate) fn hello_answered(&mut self, index: usize, result: &Answer) {
        match result {
            Ok(_) | Err(ReplicaError::Invalid) => {}
            Err(error) => {
                if self.members[index].follows() {
                    self.member_failed(index, *error);
                }
            }
        }
    }
}
