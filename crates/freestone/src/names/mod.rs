//! Named machines: a folder for each below a runtime directory, by which other commands find a machine and learn what became of
//! it.
//!
//! | file | what it is |
//! |---|---|
//! | `lock` | locked by the VMM as long as it lives; its process id |
//! | `config.json` | the arguments of the machine, and what a list shows of it |
//! | `control` | the control socket |
//! | `console` | the console socket of a machine without a terminal |
//! | `log`, `console.log` | what VMM and guest wrote, of a machine without a terminal |
//! | `exit.json` | how the machine ended |

mod claim;
mod name;
mod note;
mod runtime;

pub(crate) use claim::Claim;
pub(crate) use name::{Name, suggestion};
pub(crate) use note::Note;
pub(crate) use runtime::{Entry, Life, Runtime};
