// Out of memory at every allocation of a request, one after another:
//
//     allocations PACKAGE [EVERY]
//
// The package is toy.py's. `operator new` of the whole process is ours, libautosteer's and onnxruntime's included; the
// n-th one that the asking thread calls throws std::bad_alloc: for small n each, then for every EVERY-th, until a
// request ends before it. Each request has a process of its own: some end it (nlohmann::json's destructor allocates),
// and from some onnxruntime does not return. Prints a line for each kind of request; the exit code is 1 if a piece of
// an unsafe prompt's unguarded answer was seen, if a safe one's was another than without the fault, or if the engine
// gives another answer afterwards.
#include <autosteer/autosteer.hpp>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <new>
#include <sys/wait.h>
#include <unistd.h>

namespace {

thread_local long until_failure = 0;  // allocations; 0: none fails

}  // namespace

void* operator new(std::size_t size) {
  if (until_failure > 0 && --until_failure == 0) throw std::bad_alloc();
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using autosteer::Engine;
using autosteer::Message;
using autosteer::Messages;

constexpr long kOwn = 64;  // about as many allocations make a request; all of these fail
constexpr unsigned kPatience = 2;  // seconds until a process that does not return is ended

struct Outcome {
  std::string text;  // of the pieces that came
  bool passed = false;  // a piece said so
  bool failed = false;  // with an error
  bool died = false;  // the process ended
  bool fired = false;  // the allocation was reached
  bool sound = false;  // afterwards an unsafe prompt is steered as before, or is an error
};

/// A piece of an answer, on its way to the process that judges it.
class Pipe {
 public:
  explicit Pipe(int file) : file_(file) {}
  void piece(const std::string& text, bool passed) const { say(passed ? 'p' : 'g', text); }
  void say(char kind, const std::string& text = {}) const {
    const long left = until_failure;
    until_failure = 0;
    const std::string line = kind + text + '\n';  // no text of the toy has a line break
    if (write(file_, line.data(), line.size()) != static_cast<ssize_t>(line.size())) std::abort();
    until_failure = left;
  }

 private:
  int file_;
};

Outcome read_from(int file, pid_t process) {
  Outcome outcome;
  std::string all;
  char buffer[4096];
  for (ssize_t count; (count = read(file, buffer, sizeof buffer)) > 0;) all.append(buffer, static_cast<size_t>(count));
  close(file);
  for (size_t at = 0, end; at < all.size() && (end = all.find('\n', at)) != std::string::npos; at = end + 1) {
    const char kind = all[at];
    if (kind == 'p' || kind == 'g') outcome.text.append(all, at + 1, end - at - 1);
    outcome.passed = outcome.passed || kind == 'p';
    outcome.failed = outcome.failed || kind == 'e';
    outcome.fired = outcome.fired || kind == 'f';
    outcome.sound = outcome.sound || kind == 's';
  }
  int status = 0;
  waitpid(process, &status, 0);
  outcome.died = !WIFEXITED(status);
  outcome.fired = outcome.fired || outcome.died;
  return outcome;
}

void stream(const Engine& engine, const char* policy, const char* prompt, const Pipe& pipe) {
  autosteer::Settings settings;
  settings.policy = policy;
  settings.max_tokens = 12;
  autosteer::Stream answer = engine.stream({Message::user(prompt)}, settings);
  while (const auto piece = answer.next()) pipe.piece(piece->text, piece->verdict.action == "pass");
}

/// A safe turn, then an unsafe one on its caches; the second's answer is shown.
void converse(const Engine& engine, const Pipe& pipe) {
  const autosteer::Conversation dialogue = engine.conversation();
  Messages messages = {Message::user("red")};
  messages.push_back(Message::assistant(dialogue.generate(messages).text, true));
  messages.push_back(Message::user("bad"));
  const autosteer::Answer answer = dialogue.generate(messages);
  pipe.piece(answer.text, answer.verdict.action == "pass");
}

/// The steered answer to an unsafe prompt, as one text.
std::string steered(const Engine& engine) {
  const autosteer::Answer answer = engine.generate({Message::user("bad")});
  return answer.verdict.action + answer.text;
}

/// What `ask` shows while the `nth` allocation fails; 0: none.
template <class Ask>
Outcome with_fault(long nth, const Ask& ask, const Engine& engine, const std::string& guarded) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t process = fork();
  if (process == 0) {
    const Pipe pipe(ends[1]);
    alarm(kPatience);
    until_failure = nth;
    try {
      ask(pipe);
    } catch (const autosteer::Error&) {
      pipe.say('e');
    } catch (const std::bad_alloc&) {
      pipe.say('e');
    }
    if (nth > 0 && until_failure == 0) pipe.say('f');
    until_failure = 0;
    try {
      if (steered(engine) == guarded) pipe.say('s');
    } catch (const autosteer::Error&) {  // onnxruntime's arena may be of no more use
      pipe.say('s');
    }
    _exit(0);
  }
  close(ends[1]);
  return read_from(ends[0], process);
}

bool wrong(const Outcome& outcome, const Outcome& sound, bool harmless) {
  if (!outcome.died && !outcome.sound) return true;
  if (!harmless && !outcome.passed && outcome.text == "sorry refuse, i must not answer that.") {
    return false;  // a steered answer that could not be judged
  }
  if (!harmless || outcome.passed)  // what is shown is a beginning of what is shown without the fault
    return (outcome.passed && !harmless) || sound.text.compare(0, outcome.text.size(), outcome.text) != 0;
  return false;  // a safe prompt that could not be judged is unsafe
}

template <class Ask>
bool try_all(const std::string& name, bool harmless, const Ask& ask, const Engine& engine, long every) {
  const std::string guarded = steered(engine);
  const Outcome sound = with_fault(0, ask, engine, guarded);
  long failed = 0, died = 0, ended = 0, bad = 0;
  for (long nth = 1;; nth += nth < kOwn ? 1 : every) {
    const Outcome outcome = with_fault(nth, ask, engine, guarded);
    if (!outcome.fired) break;
    (outcome.died ? died : outcome.failed ? failed : ended) += 1;
    if (wrong(outcome, sound, harmless)) {
      ++bad;
      std::cout << name << ", allocation " << nth << ": '" << outcome.text << "' instead of '" << sound.text << "'"
                << (outcome.passed ? ", passed" : "") << (outcome.failed ? ", an error" : "")
                << (outcome.sound ? "" : ", and then another answer") << std::endl;
    }
  }
  std::cout << name << ": " << failed + died + ended << " allocations failed: " << failed << " errors, " << ended
            << " answers, " << died << " ends of the process; " << bad << " wrong" << std::endl;
  return bad == 0 && failed > 0 && sound.sound && !sound.failed && sound.passed == harmless;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) return 2;
  const long every = argc > 2 ? std::atol(argv[2]) : 1;
  autosteer::EngineOptions options;
  options.threads = 1;
  const Engine engine(argv[1], options);
  bool good = true;
  for (const char* policy : {"steer", "stop"})
    for (const char* prompt : {"bad", "crash", "red"}) {
      const bool harmless = std::string(prompt) == "red";
      const std::string name = std::string(prompt) + ", " + policy;
      const auto ask = [&](const Pipe& pipe) { stream(engine, policy, prompt, pipe); };
      good = try_all(name, harmless, ask, engine, every) && good;
    }
  const auto talk = [&](const Pipe& pipe) { converse(engine, pipe); };
  return try_all("conversation", false, talk, engine, every) && good ? 0 : 1;
} catch (const autosteer::Error& err) {
  std::cerr << err.what() << "\n";
  return err.code;
}
