// ask PACKAGE PROMPT [PICTURE...]: the answer on stdout, what the gate made of the prompt on stderr.
#include <autosteer/autosteer.hpp>
#include <iostream>

int main(int argc, char** argv) try {
  if (argc < 3) return std::cerr << "usage: ask PACKAGE PROMPT [PICTURE...]\n", 2;
  const autosteer::Engine engine(argv[1]);
  const std::vector<autosteer::Image> pictures(argv + 3, argv + argc);
  for (const autosteer::Chunk& chunk : engine.stream({autosteer::Message::user(argv[2], pictures)})) {
    std::cout << chunk.text << std::flush;
    if (chunk.finish_reason.empty()) continue;
    std::cerr << "\n[" << chunk.verdict.action << ", p_unsafe " << chunk.verdict.p_unsafe << "]\n";
  }
  return 0;
} catch (const autosteer::Error& err) {
  std::cerr << "ask: " << err.what() << "\n";
  return err.code;
}
