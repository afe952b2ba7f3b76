"""What tools/aarch64 is made of: arm64 packages, a cross-compiler, an emulator, and a comparison of answers."""
