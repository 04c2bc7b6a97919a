"""Tools as agents have them: names, descriptions, names of each parameter, questions. Data only."""

from __future__ import annotations

# fmt: off
USUAL_TOOLS: tuple[
    tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, ...], ...], tuple[str, ...]], ...
] = (
    (
        ("get_weather", "get_weather", "get_current_weather", "weather", "getWeather"),
        ("Get the weather in a city.", "Get the current weather in a city.", "Weather of a place"),
        (("city", "location", "place"),),
        (
            "What is the weather in {}?", "What's the weather like in {}?", "How is the weather in {}?",
            "Is it raining in {}?", "Tell me the weather in {}.", "What is the weather like in {} today?",
        ),
    ),
    (
        ("get_time", "get_time", "get_current_time", "time", "current_time"),
        ("Get the time in a city.", "Get the current time in a city.", "The time in a timezone"),
        (("city", "timezone", "location", "place"),),
        (
            "What time is it in {}?", "What's the time in {}?", "Tell me the time in {}.",
            "What is the time in {}?", "What is the current time in {}?",
        ),
    ),
    (
        ("search", "search", "web_search", "search_web"),
        ("Search the web.", "Search the web for a query.", "Searches the internet.", "Find pages."),
        (("query", "query", "q", "text"),),
        (
            "Search for {}.", "Search the web for {}.", "Find information about {}.", "Search {}",
            "Look for {} on the web.", "Please search for {}.", "Can you search the web for {}?",
        ),
    ),
    (
        ("read_file", "read_file", "open_file", "Read", "cat"),
        ("Read a file.", "Reads a file from the disk.", "Get the contents of a file."),
        (("path", "file_path", "filename"),),
        ("Read {}.", "Read the file {}.", "Open {}.", "What is in the file {}?", "Show me the file {}."),
    ),
    (
        ("delete_file", "remove_file", "delete"),
        ("Delete a file.", "Removes a file from the disk."),
        (("path", "file_path", "filename"),),
        ("Delete {}.", "Remove {}.", "Delete the file {}.", "Please remove the file {}."),
    ),
    (
        ("list_files", "list_directory", "ls"),
        ("List the files in a folder.", "Lists a directory."),
        (("path", "folder", "directory"),),
        ("List the files in {}.", "Which files are in {}?", "List {}.", "What is in the folder {}?"),
    ),
    (
        ("run_command", "bash", "shell", "run"),
        ("Run a shell command.", "Runs a command and returns its output."),
        (("command", "cmd"),),
        ("Run {}.", "Run the command {}.", "Execute {}.", "Please run {}."),
    ),
    (
        ("send_email", "send_message", "send_email"),
        ("Send an email.", "Sends a message to somebody."),
        (("to", "recipient"), ("subject", "text", "body")),
        ("Send {} an email about {}.", "Write to {} about {}.", "Send a message to {}: {}."),
    ),
    (
        ("translate", "translate_text"),
        ("Translate a text.", "Translates a text to another language."),
        (("text",), ("language", "target", "to")),
        ("Translate {} to {}.", "Please translate {} into {}.", "What is {} in {}?"),
    ),
    (
        ("get_stock_price", "stock_price", "get_quote"),
        ("Get the price of a stock.", "Returns the stock price of a company."),
        (("symbol", "ticker", "company"),),
        (
            "What is the stock price of {}?", "What does a share of {} cost?", "How is the stock of {}?",
            "Get the stock price of {}.",
        ),
    ),
    (
        ("get_order_status", "track_order", "order_status"),
        ("Get the status of an order.", "Track an order."),
        (("order_id", "id", "order"),),
        ("Where is my order {}?", "What is the status of order {}?", "Track order {}."),
    ),
    (
        ("get_user", "find_user", "lookup_customer"),
        ("Find a user.", "Get the profile of a user."),
        (("name", "user_id", "username"),),
        ("Find the user {}.", "Who is {}?", "Get the user {}.", "Look up the user {}."),
    ),
    (
        ("create_note", "add_note", "remember", "save_note"),
        ("Save a note.", "Writes down a note for later."),
        (("text", "note", "content"),),
        ("Note: {}", "Make a note of {}.", "Write down {}.", "Save a note: {}"),
    ),
    (
        ("set_reminder", "create_reminder", "remind"),
        ("Set a reminder.", "Reminds the user of something."),
        (("text", "title", "what"),),
        ("Remind me of {}.", "Set a reminder for {}.", "Remind me about {}."),
    ),
    (
        ("define", "get_definition", "dictionary"),
        ("Define a word.", "Get the meaning of a word."),
        (("word", "term"),),
        ("What does {} mean?", "Define {}.", "What is the meaning of {}?", "Define the word {}."),
    ),
    (
        ("book_flight", "find_flights", "search_flights"),
        ("Find flights from one city to another.", "Book a flight."),
        (("origin", "from", "departure"), ("destination", "to", "arrival")),
        ("Find a flight from {} to {}.", "Book a flight from {} to {}.", "I want to fly from {} to {}."),
    ),
    (
        ("book_hotel", "find_hotel", "search_hotels"),
        ("Book a hotel.", "Find a hotel in a city."),
        (("city", "location", "place"),),
        ("Book a hotel in {}.", "Find me a hotel in {}.", "I need a hotel in {}."),
    ),
    (
        ("play_music", "play", "play_song"),
        ("Play a song.", "Plays music."),
        (("song", "title", "name"),),
        ("Play {}.", "Play the song {}.", "I want to hear {}.", "Play some music by {}."),
    ),
    (
        ("call", "call_contact", "phone"),
        ("Call somebody.", "Calls a person by phone."),
        (("name", "contact", "person"),),
        ("Call {}.", "Phone {}.", "I want to talk to {}.", "Call {} on the phone."),
    ),
    (
        ("get_news", "news", "latest_news"),
        ("Get the news.", "Returns the latest news about a topic."),
        (("topic", "subject", "country"),),
        ("What is the news about {}?", "What is new in {}?", "Get the latest news about {}."),
    ),
)
