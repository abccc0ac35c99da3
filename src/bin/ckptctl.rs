//! `ckptctl`: the operator's client of ckptd. Everything is in [`ckptd::cli`].

fn main() -> std::process::ExitCode {
    ckptd::cli::run()
}
