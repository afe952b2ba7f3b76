// Many mixed requests from several threads on one engine of libautosteer, as tests/attacks/soak.py asks Python's:
//
//     soak PACKAGE REQUESTS THREADS [AUDIT_FILE]
//
// The package is toy.py's. Each outcome must be that of the same request alone. Prints resident memory as it goes; the
// exit code is 1 if an outcome differed, or an unsafe prompt got a piece of its unguarded answer.
#include <atomic>
#include <autosteer/autosteer.hpp>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <unistd.h>

namespace {

using autosteer::Engine;
using autosteer::Message;
using autosteer::Messages;
using autosteer::Settings;

const std::vector<uint8_t> kBlue = [] {
  std::vector<uint8_t> pixels(8 * 8 * 3, 0);
  for (size_t i = 2; i < pixels.size(); i += 3) pixels[i] = 255;
  return pixels;
}();

std::atomic<int> unguarded{0};

/// All of an answer but its timings. Counts pieces of an unsafe prompt's answer that is neither steered nor refused.
std::string told(const autosteer::Answer& answer, bool harmless) {
  std::string text = answer.verdict.action + " " + std::to_string(answer.verdict.p_unsafe) + " " +
                     answer.finish_reason + " " + answer.text;
  for (const int64_t token : answer.token_ids) text += " " + std::to_string(token);
  if (!harmless && answer.verdict.action == "pass") unguarded += 1 + static_cast<int>(answer.token_ids.size());
  return text;
}

Settings with(const char* policy, int64_t max_tokens = 20) {
  Settings settings;
  settings.policy = policy;
  settings.max_tokens = max_tokens;
  return settings;
}

std::string ask(const Engine& engine, const Messages& messages, const Settings& settings, bool harmless) {
  return told(engine.generate(messages, settings), harmless);
}

std::string conversation(const Engine& engine, int) {
  const autosteer::Conversation dialogue = engine.conversation();
  Messages messages = {Message::user("red")};
  const autosteer::Answer first = dialogue.generate(messages, with("steer"));
  messages.push_back(Message::assistant(first.text, true));
  messages.push_back(Message::user("bad"));
  const std::string second = told(dialogue.generate(messages, with("steer")), false);
  messages.back() = Message::user("tick");
  return told(first, true) + "; " + second + "; " + told(dialogue.generate(messages, with("steer", 5)), true);
}

/// Cancelled by another thread, at any time: a beginning of the whole answer, and then nothing.
std::string cancelled(const Engine& engine, int number) {
  autosteer::Stream stream = engine.stream({Message::user("tick")}, with("steer", 30));
  std::atomic<bool> go{false};
  std::thread other([&] {
    while (!go) std::this_thread::yield();
    stream.cancel();
  });
  std::string text;
  int pieces = 0;
  try {
    while (const auto chunk = (pieces == number % 7 ? void(go = true) : void(), stream.next())) {
      text += chunk->text;
      ++pieces;
    }
  } catch (const autosteer::Error& err) {
    if (err.code != AUTOSTEER_CANCELLED) text += err.what();
  }
  go = true;
  other.join();
  std::string whole;
  while (whole.size() < text.size()) whole += whole.size() % 8 == 0 ? "tock" : "tick";
  return whole == text ? "a beginning" : text;
}

std::string refused(const Engine& engine, int) {
  std::string long_text;
  for (int i = 0; i < 80; ++i) long_text += "red ";
  try {
    return ask(engine, {Message::user(long_text)}, with("steer"), true);
  } catch (const autosteer::Error& err) {
    return std::to_string(err.code);
  }
}

std::string left(const Engine& engine, int) {
  return engine.stream({Message::user("hello")}, with("steer")).next()->text;
}

std::string sampled(const Engine& engine, int) {
  Settings settings = with("steer");
  settings.temperature = 1.0;
  settings.seed = 7;
  return ask(engine, {Message::user("hello red")}, settings, true);
}

using Kind = std::function<std::string(const Engine&, int)>;

const std::map<std::string, Kind> kKinds = {
    {"safe", [](const Engine& e, int) { return ask(e, {Message::user("red")}, with("steer"), true); }},
    {"unsafe", [](const Engine& e, int) { return ask(e, {Message::user("bad")}, with("steer"), false); }},
    {"stopped", [](const Engine& e, int) { return ask(e, {Message::user("bad")}, with("stop"), false); }},
    {"prober fails", [](const Engine& e, int) { return ask(e, {Message::user("crash")}, with("steer"), false); }},
    {"prober: nan", [](const Engine& e, int) { return ask(e, {Message::user("nan")}, with("stop"), false); }},
    {"picture",
     [](const Engine& e, int) {
       const auto image = autosteer::Image::from_rgb(8, 8, kBlue.data());
       return ask(e, {Message::user("look", {image, image})}, with("steer"), true);
     }},
    {"conversation", conversation},
    {"cancelled", cancelled},
    {"refused", refused},
    {"left", left},
    {"sampled", sampled}};

long rss_kib() {
  std::ifstream file("/proc/self/statm");
  long pages = 0;
  file >> pages >> pages;
  return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) return 2;
  const int requests = std::atoi(argv[2]), threads = std::atoi(argv[3]);
  autosteer::EngineOptions options;
  options.threads = 1;
  if (argc > 4) options.audit = argv[4];
  const Engine engine(argv[1], options);
  std::map<std::string, std::string> alone;
  for (const auto& [name, kind] : kKinds) alone[name] = kind(engine, 3);
  std::atomic<int> next{0}, differ{0};
  std::mutex printing;
  const auto work = [&] {
    for (int n; (n = next++) < requests;) {
      auto kind = kKinds.begin();
      std::advance(kind, std::mt19937(static_cast<unsigned>(n))() % kKinds.size());
      std::string outcome;
      try {
        outcome = kind->second(engine, n);
      } catch (const autosteer::Error& err) {
        outcome = err.what();
      }
      const std::lock_guard lock(printing);
      if (outcome != alone[kind->first]) {
        ++differ;
        std::cout << kind->first << ": " << outcome << "\n  alone: " << alone[kind->first] << std::endl;
      }
      if (n % std::max(requests / 10, 1) == 0) std::cout << n << " requests, " << rss_kib() << " KiB" << std::endl;
    }
  };
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(work);
  for (std::thread& worker : workers) worker.join();
  std::cout << requests << " requests, " << rss_kib() << " KiB; " << differ << " differ, " << unguarded
            << " tokens of unguarded answers" << std::endl;
  return differ || unguarded ? 1 : 0;
} catch (const autosteer::Error& err) {
  std::cerr << err.what() << "\n";
  return err.code;
}
