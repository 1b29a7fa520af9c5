//! placeholder until written
pub fn run(_demo: &crate::cli::Demo, _stop: &std::sync::atomic::AtomicBool) -> anyhow::Result<()> {
    anyhow::bail!("not there yet")
}
