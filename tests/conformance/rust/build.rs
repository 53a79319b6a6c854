//! Generates the stubs from what `buf build -o unslothd.binpb` made of the protos.
use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-env-changed=UNSLOTHD_PROTOS");
    let bytes = std::fs::read(std::env::var("UNSLOTHD_PROTOS")?)?;
    let protos = prost_types::FileDescriptorSet::decode(bytes.as_slice())?;
    tonic_prost_build::configure().build_server(false).compile_fds(protos)?;
    Ok(())
}
