//! crun-gateway: one account's 15 TaskInfo queries a second serve a whole company.

pub mod account;
pub mod config;
pub mod outcome;
pub mod simulator;
