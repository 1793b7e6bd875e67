//! The command line: arguments, commands, the life of a gateway process, exit codes.

pub mod arguments;
pub mod commands;
pub mod exit;
pub mod serve;
