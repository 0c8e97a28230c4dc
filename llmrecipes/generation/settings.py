"""How an answer is drawn from the model. Every choice stands here, none is taken from the model's own folder."""

from dataclasses import dataclass

from llmrecipes.errors import ConfigError


@dataclass(frozen=True)
class GenerationSettings:
    """One complete set of choices; the names are the flags of the inference command.

    Raises `ConfigError`, with one line a problem, for a value that could not be carried out.
    """

    max_new_tokens: int = 100
    do_sample: bool = False
    """False takes the likeliest token each time; the four settings that shape the draw then play no part."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    """Draw from the k likeliest tokens; 0 draws from all."""
    repetition_penalty: float = 1.0
    """Keskar et al. 2019 (CTRL), section 4.1; 1.0 is none. Counts the tokens of the prompt too."""
    length_penalty: float = 1.0
    """Only beam search has a use for it, and we do not search with beams: any other value is refused."""
    min_new_tokens: int = 0
    min_length: int | None = None
    """The least tokens of prompt and answer together, as llama-recipes counts them."""
    use_cache: bool = True
    stop_token_ids: tuple[int, ...] = ()
    """An answer ends before the first of these; with none it ends after `max_new_tokens`."""
    seed: int = 42

    def __post_init__(self) -> None:
        problems = [message for fault, message in self._rules() if fault]
        if problems:
            raise ConfigError("\n".join(problems))

    def _rules(self) -> list[tuple[bool, str]]:
        """Returns (broken?, what to say) for every rule."""
        most = self.max_new_tokens
        return [
            (most < 1, f"--max_new_tokens is {most}; expected 1 or more"),
            (
                self.do_sample and not self.temperature > 0,
                f"--temperature is {self.temperature}; expected more than 0 (for the likeliest token each time, "
                "pass --do_sample false)",
            ),
            (not 0 < self.top_p <= 1, f"--top_p is {self.top_p}; expected more than 0 and at most 1"),
            (self.top_k < 0, f"--top_k is {self.top_k}; expected 0 (draw from all tokens) or more"),
            (
                not self.repetition_penalty > 0,
                f"--repetition_penalty is {self.repetition_penalty}; expected more than 0 (1.0 is no penalty)",
            ),
            (
                self.length_penalty != 1.0,
                f"--length_penalty {self.length_penalty} would have no effect: it is for beam search, which this "
                "command does not do; leave it out, and use --max_new_tokens or --min_new_tokens",
            ),
            (
                not 0 <= self.min_new_tokens <= most,
                f"--min_new_tokens is {self.min_new_tokens}; expected 0 to --max_new_tokens ({most})",
            ),
            (
                self.min_length is not None and self.min_length < 0,
                f"--min_length is {self.min_length}; expected 0 or more",
            ),
            (
                any(token < 0 for token in self.stop_token_ids),
                f"the stop tokens are {self.stop_token_ids}; expected ids of 0 or more",
            ),
            (
                not 0 <= self.seed < 2**63,
                f"--seed is {self.seed}; expected 0 to 2**63 - 1",
            ),
        ]
