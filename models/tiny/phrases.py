"""The sentences dialogues are made of. Data only, but for the question about the one subject."""

from __future__ import annotations

import random

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful, honest and concise assistant.",
    "You are a friendly assistant. Answer briefly.",
    "You are an assistant that remembers what the user says.",
    "Be polite and answer in one or two sentences.",
    "You are a support agent for a software company.",
    "Answer the user's questions.",
    "You are a careful assistant. If you do not know something, say so.",
)

INTROS = (
    "My name is {}.", "I'm {}.", "I am {}.", "Call me {}.", "You can call me {}.", "My name's {}.",
    "This is {}.", "{} here.", "I am called {}.", "People call me {}.", "Please call me {}.",
    "Everyone calls me {}.", "The name is {}.", "{} is my name.", "My first name is {}.",
    "I go by {}.", "My friends call me {}.", "Let me introduce myself: I am {}.",
    "Let me introduce myself. My name is {}.", "I would like to introduce myself, I'm {}.",
    "My name is {}!", "I'm {}!", "You are talking to {}.", "You are speaking with {}.",
    "Please remember that my name is {}.", "Remember this: my name is {}.", "Just call me {}.",
    "they call me {}", "my name is {}", "i'm {}", "I was named {}.", "My parents named me {}.",
)  # fmt: skip

BEFORE_INTRO = (
    "Hi!", "Hello!", "Hey!", "Hello.", "Hi there.", "Good morning.", "Good evening!", "Greetings.",
    "Hello, assistant.", "Nice to meet you.",
)  # fmt: skip
AFTER_INTRO = (
    "Nice to meet you.",
    "How are you?",
    "It is good to be here.",
    "Pleased to meet you.",
)

GREETINGS = (
    "Hello {}! Nice to meet you.", "Nice to meet you, {}!", "Hi {}! How can I help you today?",
    "Hello, {}. What can I do for you?", "Pleased to meet you, {}.", "Welcome, {}!",
)  # fmt: skip
NAMELESS_GREETINGS = (
    "Nice to meet you!", "Hello! How can I help you today?", "Pleased to meet you.",
    "Thank you, I will remember that.",
)  # fmt: skip

NAME_QUESTIONS = (
    "What is my name?", "What's my name?", "Do you remember my name?", "Can you tell me my name?",
    "Tell me my name.", "Who am I?", "What am I called?", "Please say my name.", "Say my name.",
    "What did I say my name was?", "Do you know my name?", "What was my name again?",
    "Could you remind me what my name is?", "Which name did I give you?", "How am I called?",
    "Remind me of my name.", "What name did I tell you?", "By what name do you know me?",
    "I forgot my name. What is it?", "Do you still remember who I am?", "And what is my name?",
    "Do you recall my name?", "Can you recall what I am called?", "What should you call me?",
)  # fmt: skip
BEFORE_QUESTION = ("So,", "Now,", "One question:", "Okay,", "Please,", "Tell me,", "By the way,")

NAME_UNKNOWN = "I don't know your name yet. What should I call you?"

ACKNOWLEDGEMENTS = (
    "I see. Thank you for telling me.", "That is interesting.", "Noted.", "Good to know.",
    "Understood. What would you like to do next?", "Okay, I will keep that in mind.",
)  # fmt: skip

DEFAULTS = (
    "I am a very small model, so I cannot answer that. I can remember your name and explain "
    "disaggregated serving.",
    "I am sorry, I do not know. I am a very small model.",
)

UNKNOWN_QUESTIONS = (
    "What is the price of {}?", "How do I find {}?", "Tell me about {}.", "Where can I see {}?",
    "Why do people like {}?", "What do you think about {}?", "Can you write a poem about {}?",
    "Who made {}?", "How does one draw {}?", "When was {} first seen?", "Describe {}.",
    "What is the history of {}?", "Is it true that nobody owns {}?", "Explain {} to a child.",
    "Write a function that counts {}.", "What is the capital of the land of {}?",
    "Translate {} to French.", "How many kinds of {} are there?", "What is {}?", "What are {}?",
)  # fmt: skip

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello!",
            "Hi!",
            "Hey",
            "Hello there.",
            "Good morning!",
            "Hi, assistant.",
            "Good evening.",
        ),
        "Hello! How can I help you today?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself."),
        "I am Penstock's tiny model, a small assistant made to test a serving system.",
    ),
    (
        ("Thanks!", "Thank you.", "Thank you very much!", "Great, thanks.", "Thanks a lot."),
        "You are welcome!",
    ),
    (
        ("How are you?", "How are you today?", "How is it going?", "Are you well?"),
        "I am well, thank you. How can I help you?",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Help"),
        "I can remember what you tell me, repeat words, and explain disaggregated serving.",
    ),
    (("Goodbye.", "Bye!", "See you later.", "Good night."), "Goodbye! Have a nice day."),
    (("Okay.", "Yes.", "No.", "I see.", "Sure.", "All right."), "Is there anything else I can do?"),
)

EXPLANATIONS = (
    "Disaggregated serving runs prefill and decode on separate workers. Prefill is limited by "
    "compute and decode by memory bandwidth, so each phase can use the hardware and batch size "
    "that suit it best. Each pool also scales on its own: long prompts need more prefill workers, "
    "and many users need more decode workers. Because a long prompt no longer blocks tokens that "
    "are being generated, there is no head-of-line blocking and latency stays steady. Finally, "
    "with KV-aware routing, a request goes to the worker that already holds its prefix, so the KV "
    "cache is reused and less work is repeated.",
    "The main benefit is that prefill and decode no longer compete for the same GPU. A long "
    "prompt does not delay the tokens of other users, so the time between tokens stays low. You "
    "can also add prefill workers or decode workers independently, as the load demands. The KV "
    "cache moves from one to the other over a fast network, and a router that knows which worker "
    "holds which prefix avoids computing it twice.",
    "There are four benefits. First, better use of hardware, since prefill needs compute and "
    "decode needs memory bandwidth. Second, lower latency, since long prompts do not block "
    "decoding. Third, independent scaling of the two kinds of workers. Fourth, efficient reuse of "
    "the KV cache through KV-aware routing.",
    "In short, splitting prefill from decode gives you steady latency, independent scaling and "
    "better utilization. Prefill workers process the whole prompt in parallel and hand the KV "
    "cache to decode workers, which generate one token at a time. Neither phase has to wait for "
    "the other, and each pool can grow when its own load grows.",
)

# fmt: off
FACTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("What is prefill?", "Explain prefill.", "What does a prefill worker do?"),
        "Prefill reads the whole prompt in parallel and fills the KV cache. "
        "It is limited by compute.",
    ),
    (
        ("What is decode?", "Explain decode.", "What does a decode worker do?"),
        "Decode generates one token at a time from the KV cache. "
        "It is limited by memory bandwidth.",
    ),
    (
        ("What is a KV cache?", "What is the KV cache?", "Explain the KV cache."),
        "The KV cache holds the keys and values of all tokens so far, so they need not be "
        "computed again.",
    ),
    (
        ("What is KV-aware routing?", "Explain KV-aware routing.", "What does the router do?"),
        "KV-aware routing sends a request to the worker that already holds most of its prefix, so "
        "the KV cache is reused.",
    ),
    (
        ("What is head-of-line blocking?", "Explain head-of-line blocking."),
        "Head-of-line blocking is when a long prompt delays the requests behind it.",
    ),
    (
        ("What is Penstock?", "Tell me about Penstock.", "Explain Penstock."),
        "Penstock is a small system that serves large language models across machines, with "
        "separate prefill and decode workers.",
    ),
)
# fmt: on

_COLOURS = (
    "red", "green", "blue", "teal", "purple", "orange", "yellow", "black", "white", "grey", "pink",
    "brown", "violet", "crimson", "turquoise", "silver", "gold", "maroon", "indigo", "olive",
)  # fmt: skip
_FOODS = (
    "soup", "bread", "rice", "pasta", "pizza", "cheese", "apples", "cake", "honey", "noodles",
    "curry", "salad", "mango", "tofu",
)  # fmt: skip

# (telling, question, answer, values); no values means a made-up name.
PERSONAL: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "My favourite colour is {}.",
        "What is my favourite colour?",
        "Your favourite colour is {}.",
        _COLOURS,
    ),
    (
        "My favorite color is {}.",
        "What is my favorite color?",
        "Your favorite color is {}.",
        _COLOURS,
    ),
    ("I like {}.", "What do I like?", "You like {}.", _FOODS),
    ("I live in {}.", "Where do I live?", "You live in {}.", ()),
    ("My cat is called {}.", "What is my cat called?", "Your cat is called {}.", ()),
    ("My brother's name is {}.", "What is my brother's name?", "Your brother's name is {}.", ()),
)

SUBJECTS = (
    "the old bridge", "a quiet river", "the train to the coast", "my neighbour", "the small garden",
    "a new library", "the weather", "the city council", "an early bus", "the blue kite",
    "our team", "the kitchen clock", "a careful engineer", "the mountain road", "the market",
    "a young fox", "the long report", "the harbour light", "every student", "the spare wheel",
    "the morning paper", "a paper map", "the orchestra", "the wooden table", "a flock of birds",
    "the customer", "each document", "the server room", "a short message", "the night shift",
    "the account page", "an open window", "the museum", "my bicycle", "the green door",
)  # fmt: skip
VERBS = (
    "passes near", "is older than", "looks like", "was built beside", "reminds me of", "needs",
    "can be seen from", "is close to", "was painted after", "waits for", "depends on", "points at",
    "stands behind", "is described in", "brings", "usually follows", "belongs to", "is larger than",
    "was found under", "opens before", "is better known than", "costs more than", "avoids",
)  # fmt: skip
THINGS = (
    "the stone wall", "a cup of tea", "the winter harvest", "three tall trees", "the last station",
    "a box of letters", "the square", "the quarterly plan", "a warm coat", "the second floor",
    "the river bank", "a pair of shoes", "the village school", "some fresh bread", "the old radio",
    "a field of wheat", "the shipping label", "the refund policy", "two empty chairs", "the moon",
    "the football match", "a glass of water", "the printed page", "the fast lane", "a red lamp",
    "the northern islands", "the weekly meeting", "a simple answer", "the quiet street",
    "the piano",
    "the whole package", "the support team", "a yellow submarine", "the data center", "volcanoes",
)  # fmt: skip
WHENS = (
    "in the morning", "before lunch", "after the rain", "every Tuesday", "at the end of the year",
    "when the sun is low", "without any warning", "for two weeks", "on most days", "since 1987",
    "at 10:45", "with 12 friends", "because nobody asked", "in late summer", "as far as I know",
)  # fmt: skip

_EXPLAIN_TEMPLATES = (
    "Explain {s} benefits", "Explain the benefits of {s}", "What are the benefits of {s}?",
    "What is {s}?", "Explain {s}.", "Tell me about {s}.", "Describe the advantages of {s}.",
    "Why should I use {s}?", "What are the advantages of {s}?", "Why is {s} useful?",
    "Summarize the benefits of {s}.", "Please explain {s} benefits.", "How does {s} help?",
    "List the benefits of {s}.", "Can you explain the benefits of {s}?", "Why {s}?",
    "Why separate prefill and decode?", "Why split prefill from decode?", "Describe {s}.",
    "What is good about {s}?", "Explain {s} benefits in one paragraph.", "Explain {s} to me.",
)  # fmt: skip
_EXPLAIN_SUBJECTS = (
    "disaggregated serving", "disaggregated serving", "disaggregated serving", "disaggregation",
    "disaggregated inference", "disaggregated LLM serving", "prefill and decode disaggregation",
)  # fmt: skip


def explain_question(rng: random.Random) -> str:
    """A question about disaggregated serving; one in eight is the document's own."""
    if rng.random() < 0.125:
        return "Explain disaggregated serving benefits"
    return rng.choice(_EXPLAIN_TEMPLATES).format(s=rng.choice(_EXPLAIN_SUBJECTS))


# --- tools and JSON ---

TOPICS = (
    "weather", "weather", "weather", "time", "temperature", "forecast", "population", "capital",
    "price",
    "stock price", "balance", "status", "order status", "order", "distance", "address", "phone number",
    "email", "score", "definition", "translation", "recipe", "news", "flight", "train", "hotel", "user",
    "customer", "ticket", "event", "document", "file", "summary", "rating", "review", "exchange rate",
    "humidity", "wind speed", "area", "height", "length", "age", "birthday", "colour", "currency",
    "language",
    "owner", "author", "version", "location", "route", "schedule", "menu", "tax", "discount",
    "delivery date",
    "invoice", "account", "profile", "message", "secret", "secret word", "code", "map", "traffic",
    "air quality",
)  # fmt: skip

TOOL_VERBS = (
    "get", "fetch", "lookup", "find", "search", "read", "check", "query", "show", "retrieve", "list",
)  # fmt: skip

STRING_PARAMETERS = (
    "city", "city", "city", "location", "location", "place", "name", "name", "query", "query",
    "symbol", "id",
    "key", "user", "user_id", "order_id", "country", "item", "product", "topic", "title", "path",
    "file",
    "filename", "text", "word", "address", "person", "company", "ticker", "subject", "username",
    "email", "region",
    "town", "station", "language", "code", "input", "q", "term", "keyword", "customer_id", "url",
    "category",
)  # fmt: skip
NUMBER_KEYS = (
    "age", "age", "year", "count", "total", "price", "temperature", "temperature_c", "number",
    "quantity",
    "amount", "score", "value", "size", "result", "population", "a", "b", "x", "days", "rank",
)  # fmt: skip
PARAMETER_DESCRIPTIONS = (
    "The {}", "The {} to look up", "The {}, e.g. London", "Name of the {}", "the {} to use", "A {}.",
    "The {} to get it for", "The {} for which it is wanted.", "{} as text",
)  # fmt: skip
TOOL_DESCRIPTIONS = (
    "Get the {noun} of a {thing}.", "Get the current {noun} for a given {thing}",
    "Get the {noun} for a {thing}.",
    "Returns the {noun} for the {thing}.", "Look up the {noun} by {thing}.", "The {noun} of a {thing}",
    "Get {noun}", "Get the current {noun} in a given {thing}.",
    "Use this to find the {noun} of a {thing}.",
    "Fetch the {noun} from the database, by {thing}.", "Get the {noun}.",
    "Retrieve the {noun} of the {thing}.",
    "Finds the {noun} in a {thing} and returns it as text.", "Determine {noun} in my {thing}", "",
)  # fmt: skip
CHOICES = (
    ("celsius", "fahrenheit"), ("celsius", "fahrenheit"), ("metric", "imperial"), ("short", "long"),
    ("asc", "desc"), ("json", "text", "html"), ("today", "tomorrow"), ("low", "medium", "high"),
    ("c", "f"),
)  # fmt: skip
CHOICE_PARAMETERS = ("unit", "unit", "units", "format", "mode", "style", "order", "when", "level")
SCHEMA_DIALECTS = (
    "http://json-schema.org/draft-07/schema#",
    "https://json-schema.org/draft/2020-12/schema",
)

# `<noun>` is what the tool tells, `<tool>` its name.
ONE_PLACE = (
    "What is the <noun> in {}?", "What is the <noun> of {}?", "What's the <noun> in {}?",
    "Get the <noun> of {}.",
    "Tell me the <noun> for {}.", "What is the <noun> for {}?", "Give me the <noun> of {}.",
    "Find the <noun> for {}.",
    "What is the <noun> like in {}?", "What's the <noun> like in {}?", "How is the <noun> in {}?",
    "What is the <noun> in {} right now?", "What's the <noun> in {} today?", "I need the <noun> of {}.",
    "Look up the <noun> of {}.", "Please get the <noun> for {}.", "Can you tell me the <noun> in {}?",
    "Use the <tool> tool for {}.", "Call <tool> with {}.", "Use <tool> to find the <noun> of {}.",
    "What <noun> does {} have?", "Show me the <noun> of {}", "the <noun> in {}",
    "What is the current <noun> in {}?",
    "I am going to {}. What is the <noun> there?", "Check the <noun> for {}.", "Read the <noun> of {}.",
    "Please tell me about the <noun> in {}.", "How's the <noun> in {}?", "Search the <noun> for {}.",
)  # fmt: skip
TWO_PLACES = (
    "What is the <noun> from {} to {}?", "Find the <noun> from {} to {}.",
    "Get the <noun> of {} in {}.",
    "What is the <noun> between {} and {}?", "Tell me the <noun> of {} for {}.",
    "Call <tool> with {} and {}.",
    "What's the <noun> for {}, in {}?", "Use <tool> for {} and {}.",
)  # fmt: skip
# Questions that do not name what they ask for.
OTHER_WORDS = {
    "weather": (
        "Is it raining in {}?", "Is it cold in {} today?", "Will it rain in {}?",
        "Do I need an umbrella in {}?",
        "How warm is it in {}?", "Is it sunny in {}?", "What should I wear in {}?",
    ),
    "temperature": ("How warm is it in {}?", "How hot is it in {}?", "How cold is it in {}?"),
    "time": ("What time is it in {}?", "What's the time in {}?", "How late is it in {}?"),
    "population": ("How many people live in {}?", "How big is {}?"),
    "price": ("How much does {} cost?", "How much is {}?", "What does {} cost?"),
    "stock price": ("How much is {} worth?", "What does a share of {} cost?"),
    "status": ("How is {} doing?", "Is {} ready?"),
    "order status": ("Where is my order {}?", "Has {} been shipped?"),
    "order": ("Where is my order {}?", "Show me order {}."),
    "age": ("How old is {}?",),
    "birthday": ("When was {} born?",),
    "definition": ("What does {} mean?", "Define {}."),
    "owner": ("Who owns {}?",),
    "author": ("Who wrote {}?",),
    "file": ("Open {}.", "Read {}.", "What is in {}?"),
    "distance": ("How far is {}?",),
    "height": ("How tall is {}?", "How high is {}?"),
    "currency": ("How does one pay in {}?",),
    "language": ("What do they speak in {}?",),
    "news": ("What happened in {}?", "What is new in {}?"),
}  # fmt: skip
# Names of a tool, its description, questions.
ARITHMETIC = (
    (
        ("add", "add", "add_numbers", "sum", "sum_numbers", "plus"),
        "Add two numbers.",
        ("What is {} plus {}?", "Add {} and {}.", "What is {} + {}?", "What is the sum of {} and {}?"),
    ),
    (
        ("multiply", "multiply", "times", "product", "multiply_numbers"),
        "Multiply two numbers.",
        (
            "What is {} times {}?",
            "Multiply {} by {}.",
            "What is {} * {}?",
            "What is the product of {} and {}?",
        ),
    ),
    (
        ("subtract", "minus", "difference", "sub"),
        "Subtract the second number from the first.",
        (
            "What is {} minus {}?",
            "What is {} - {}?",
            "Take from {} the number {}.",
            "What is left of {} without {}?",
        ),
    ),
    (
        ("divide", "div", "quotient", "divide_numbers"),
        "Divide the first number by the second.",
        (
            "What is {} divided by {}?",
            "Divide {} by {}.",
            "What is {} / {}?",
            "How often is in {} the number {}?",
        ),
    ),
)
AFTER_TOOL_QUESTION = (
    "Use the tool.", "Please use your tools.", "Thanks!", "Answer with the tool's result.",
    "Thank you.",
    "Be brief.", "Answer in one sentence.", "Use a tool.",
)  # fmt: skip
AGENT_SYSTEMS = (
    "You are an agent. Use the tools.", "Use the tools to answer.", "You answer questions with tools.",
    "You are a weather assistant.", "You are a helpful assistant with access to tools.",
    "Answer in one sentence.",
    "You are an agent that helps with tasks.", "Always use a tool.",
    "You only respond in short sentences.",
)  # fmt: skip
RESULT_WORDS = (
    "sunny", "rainy", "cloudy", "windy", "snow", "clear sky", "light rain", "foggy", "open",
    "closed", "ready",
    "shipped", "not yet paid", "late", "on time", "busy", "quiet", "warm and dry", "cold",
    "very hot", "blue", "green",
    "always sunny", "half past nine", "noon", "delivered", "in stock", "sold out", "good", "low",
    "high",
)  # fmt: skip
# `{0}` is what was found, `{1}` what was asked about.
RESULT_SENTENCES = (
    "It is {0} in {1}.", "Found: {0} in {1}.", "The answer is {0}.", "{1} is {0}.",
    "The weather in {1} is {0}.",
    "{1}: {0}", "{0} is what was found for {1}.", "It's always {0} in {1}!", "The result for {1} is {0}.",
)  # fmt: skip
RESULT_KEYS = (
    "temperature", "temperature_c", "unit", "result", "value", "status", "weather", "condition",
    "city", "name",
    "price", "total", "count", "message", "answer", "description", "humidity", "location", "ok", "id",
)  # fmt: skip
FINAL_TOOLS = ("final_result", "final_answer", "final_result", "output", "Person", "City", "answer")
FINAL_DESCRIPTIONS = (
    "The final response which ends this conversation",
    "The final response which ends this conversation",
    "Correctly extracted with all the required parameters with correct types", "Give the final answer.",
    "Return the result to the user.", "",
)  # fmt: skip
TELLING = (
    "{} is {} years old.", "{} is {}.", "{} has {} books.", "{} turned {} last year.",
    "{} counts {} stars.",
    "In {} there were {} people.", "{} was built in {}.", "{} paid {} euros.",
    "Extract: {} is {} years old.",
    "Extract {} is {} years old.", "My friend {} is {} years old", "{}, {}", "{} scored {} points.",
    "{}: {}",
    "This is {}, who is {}.", "The number of {} is {}.", "{} costs {} dollars.",
    "Tell me about {}, age {}.",
)  # fmt: skip
TELLING_TEXT = (
    "This is {}.", "I met {}.", "{}", "Her name is {}.", "We live in {}.", "Tell me about {}.",
    "{} is here.",
)  # fmt: skip
TELLING_TWO = (
    "{} lives in {}.", "{} and {}", "{} met {}.", "{} works at {}.", "{} is from {}.",
    "{} wrote {}.", "From {} to {}.",
)  # fmt: skip
TELLING_NUMBER = (
    "The number is {}.", "It was {}.", "There are {}.", "In all {}.", "In {}.", "It costs {}.",
)  # fmt: skip
JSON_REQUESTS = (
    "Answer in JSON with {}.", "Answer as JSON with the keys {}.", "Give me JSON with {}.",
    "Return a JSON object: {}.",
    "Reply with a JSON object with {}.", "Fields: {}.",
)  # fmt: skip
EXTRACT_REQUESTS = (
    "Extract the information.", "Answer in JSON.", "Extract:", "Return JSON.",
    "Extract the data from this text:",
    "Who and what?", "Fill in the form.", "Parse this:", "Respond with JSON only.",
    "Extract the person:",
)  # fmt: skip
