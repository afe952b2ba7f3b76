// Every error that a user can cause or meet. The C++ side of runtime/errors.py, with the same exit codes.
#pragma once

#include <stdexcept>
#include <string>

namespace autosteer {

/// `text` with a space for each control character: an error is one line, whatever a file or a key is called.
inline std::string in_one_line(std::string text) {
  for (char& c : text) {
    if (0 <= c && c < ' ') c = ' ';
  }
  return text;
}

/// Base of all our errors: one line that says what is wrong, where, and what to do.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& what, int exit_code = 1)
      : std::runtime_error(in_one_line(what)), exit_code(exit_code) {}
  const int exit_code;  ///< of autosteer-cli; also what the C functions return
};

/// A package is missing, damaged, of another version, or not what it says.
struct PackageError : Error {
  explicit PackageError(const std::string& what) : Error(what, 3) {}
};

/// The execution provider that was asked for cannot run here.
struct ProviderError : Error {
  explicit ProviderError(const std::string& what) : Error(what, 4) {}
};

/// A prompt or an image is unusable, or does not fit the model's context.
struct InputError : Error {
  explicit InputError(const std::string& what) : Error(what, 5) {}
};

/// A number or a text that does not fit. `field` is its name in C++ and in JSON; a command names its option instead.
struct OptionError : InputError {
  OptionError(const std::string& field, const std::string& problem)
      : InputError(field + problem), field(field), problem(problem) {}
  const std::string field, problem;
};

/// The audit record of a request cannot be written.
struct AuditError : Error {
  explicit AuditError(const std::string& what) : Error(what) {}
};

/// The stream was cancelled, by another thread.
struct Cancelled : Error {
  Cancelled() : Error("the answer was cancelled", 130) {}
};

}  // namespace autosteer
