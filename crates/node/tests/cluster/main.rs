//! Several nodes of production machines, in memory: grants, state messages, members that come and
//! go, fills, damage.

mod damage;
mod fills;
mod grants;
mod harness;
mod states;
