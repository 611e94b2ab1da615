"""Prompts of the kinds people ask for, put together from tasks and subjects: a JSON line each.

Run: python recipes/smollm2-135m-instruct/prompts.py NUMBER SEED > prompts.jsonl. No benchmark's prompt is among them, and `redrafter train
--exclude` sees to it. The strings keep the spelling they had when text.npz was made: another one would be another prompt.
"""

# ruff: noqa: E501  (sentences)

from __future__ import annotations

import json
import random
import sys

SUBJECTS = {
    "science": (
        "volcanoes", "magnets", "the water cycle", "black holes", "vaccines", "plate tectonics", "the immune system", "batteries",
        "sound waves", "lenses and mirrors", "friction", "acids and bases", "the periodic table", "evolution", "coral reefs", "glaciers",
        "the human heart", "the ozone layer", "nuclear fusion", "bacteria and viruses", "gravity", "tides", "enzymes", "fermentation",
        "the nervous system", "soil erosion", "comets", "electric motors", "wind turbines", "the greenhouse effect", "cell division",
    ),
    "society": (
        "the Roman Republic", "the Silk Road", "the French Revolution", "the printing press", "unions", "inflation", "minimum wages",
        "international trade", "the Renaissance", "jazz", "Buddhism", "the Cold War", "universal suffrage", "Plato's allegory of the cave",
        "utilitarianism", "stoicism", "the Industrial Revolution", "public libraries", "urban planning", "migration", "taxes", "museums",
        "journalism", "human rights", "colonialism", "the Olympic Games", "impressionism", "Shakespeare's tragedies", "folk tales",
        "monetary unions", "the welfare state", "existentialism", "ancient Egypt", "the Vikings", "local elections",
    ),
    "daily": (
        "a vegetable garden", "a family budget", "a road trip", "a birthday party for a ten-year-old", "a job interview", "moving house",
        "a marathon", "learning Spanish", "a small bakery", "a school science fair", "better sleep", "a wedding on a small budget",
        "caring for a puppy", "a weekly meal plan", "a home office", "a community clean-up day", "first aid at home", "a reading club",
        "saving for retirement", "a camping weekend", "playing the guitar", "a neighbourhood dispute", "online safety for children",
        "starting to run", "a used car", "time management at university", "remote work", "public speaking nerves",
    ),
    "code": (
        "reverses a string", "checks whether a word is a palindrome", "counts the vowels in a text", "merges two dictionaries",
        "removes duplicates from a list and keeps the order", "finds the second largest number in a list", "computes a factorial",
        "converts Celsius to Fahrenheit", "finds all prime numbers below n", "validates an email address", "flattens a nested list",
        "rotates a matrix by ninety degrees", "sorts a list of dictionaries by a key", "computes the greatest common divisor",
        "transposes a matrix", "finds the longest word in a sentence", "groups words by their first letter", "computes a moving average",
        "parses a date in the format YYYY-MM-DD", "implements a stack", "implements a queue with two stacks", "searches a sorted array",
        "inserts a node into a linked list", "detects a cycle in a linked list", "counts the leaves of a tree", "sums the digits of a number",
        "reads a CSV file and prints the mean of every column", "downloads a page and counts its links", "generates a random password",
        "converts a number to Roman numerals", "checks balanced brackets", "computes the edit distance of two words",
    ),
}  # fmt: skip
PEOPLE = (
    "Anna", "Omar", "Li Wei", "Carlos", "Fatima", "Ravi", "Sofia", "Kenji", "Amara", "Peter", "Ingrid", "Mateo", "Leila", "Noah", "Grace", "Ivan",
)  # fmt: skip
ROLES = (
    "a pirate captain", "a museum guide", "a strict but kind grandmother", "a detective in a small town", "a nutritionist", "a financial adviser",
    "a medieval blacksmith", "a robot that has just been switched on", "a sports commentator", "a travel agent", "a librarian", "a ship's cook",
    "a history professor", "a lighthouse keeper", "a personal trainer", "a chess coach", "an astronaut on the way to Jupiter", "a gardener",
    "a tax lawyer", "a mountain", "a river", "an old dog", "a science journalist", "a software engineer", "a nurse on the night shift",
)  # fmt: skip
THINGS = (
    "pencils",
    "apples",
    "tickets",
    "books",
    "eggs",
    "stamps",
    "chairs",
    "bottles",
    "marbles",
    "cookies",
    "shirts",
    "plants",
)
CITIES = (
    ("Lisbon", "Portugal", "Portuguese"), ("Nairobi", "Kenya", "Swahili"), ("Oslo", "Norway", "Norwegian"), ("Lima", "Peru", "Spanish"),
    ("Hanoi", "Vietnam", "Vietnamese"), ("Athens", "Greece", "Greek"), ("Cairo", "Egypt", "Arabic"), ("Seoul", "South Korea", "Korean"),
)  # fmt: skip
BUSINESS = (
    "Northwind",
    "Bluebird Foods",
    "Atlas Tools",
    "Greenfield Farms",
    "Lumen Optics",
    "Harbor Freight Lines",
    "Orchid Hotels",
)
VERDICTS = (
    "The room was spotless and the staff could not have been kinder.", "It broke after two days and nobody answered my emails.",
    "It does what it says, nothing more.", "Far too expensive for what you get.", "I have bought three more for my friends.",
    "The sound is thin, but the battery lasts for ever.", "Delivery was late, the product itself is fine.", "Best soup I ever had!",
)  # fmt: skip


def prompt(rng: random.Random) -> str:
    """One prompt: a kind of task, then its particulars."""
    kinds = (writing, roleplay, reasoning, mathematics, coding, extraction, science, humanities)
    return rng.choice(kinds)(rng)


def writing(rng: random.Random) -> str:
    daily, subject, who = rng.choice(SUBJECTS["daily"]), any_subject(rng), rng.choice(PEOPLE)
    return rng.choice((
        f"Write a blog post about {daily}, with an introduction and practical tips.",
        f"Write a short story in which {who} learns something unexpected about {subject}.",
        f"Write a polite email to {who} about {daily}, asking for a reply by Friday. Keep it brief.",
        f"Write a poem of four stanzas about {subject}.",
        f"Write a product description for an app that helps with {daily}.",
        f"Write a news article about {subject} for a local newspaper.",
        f"Give me three catchy titles for an article about {subject}, and say why each works.",
        f"Write the opening scene of a novel. It should mention {subject} and a character named {who}.",
        f"Make an outline for a talk on {subject}, with headings and key points.",
        f"Rewrite this so that it sounds professional: hey {who}, cant make it to the meeting about {daily}, lets do it some other day ok",
        f"Correct the grammar: {who} have went to the library yesterday because they was needing a book about {subject}.",
        f"Write a speech of about 200 words that persuades people to care about {subject}.",
    ))  # fmt: skip


def roleplay(rng: random.Random) -> str:
    role, subject, daily = rng.choice(ROLES), any_subject(rng), rng.choice(SUBJECTS["daily"])
    return rng.choice((
        f"You are {role}. Tell me what you think about {subject}.",
        f"Act as {role}. I would like your advice on {daily}.",
        f"Pretend to be {role} and describe your day.",
        f"Speak as {role} would. Explain {subject} to a visitor.",
        f"Imagine that you are {role} and somebody asks you for help with {daily}. What do you say?",
        f"I want you to play {role}. Stay in character. What are you most afraid of, and why?",
        f"You are {role}. Write a letter to your younger self.",
    ))  # fmt: skip


def reasoning(rng: random.Random) -> str:
    a, b, c = rng.sample(PEOPLE, 3)
    n, m = rng.randint(2, 6), rng.randint(2, 9)
    thing, subject = rng.choice(THINGS), any_subject(rng)
    return rng.choice((
        f"{a} is taller than {b}. {b} is taller than {c}. Who is the shortest? Explain.",
        f"{a} has {n} brothers, and every brother has {m} {thing}. How many {thing} do the brothers have together?",
        f"If all {thing} in the box are red and {a} takes one from the box, what colour is it? Explain your reasoning step by step.",
        f"{a}, {b} and {c} sit in a row. {b} is not next to {c}. Who sits in the middle?",
        f"Yesterday {a} said: I will do it the day after tomorrow. Today is {rng.choice(('Monday', 'Thursday', 'Sunday'))}. On which day will it be done?",
        f"Is the following argument valid? All experts on {subject} read a lot. {a} reads a lot. So {a} is an expert on {subject}.",
        f"{a} walks {n} km north, then {m} km east. In which direction from the start is {a} now? Explain.",
        f"Which one is different from the others, and why: {', '.join(rng.sample(THINGS, 4))}?",
        f"What are possible reasons why {a} went out in the rain without an umbrella and did not get wet?",
    ))  # fmt: skip


def mathematics(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 30), rng.randint(2, 60), rng.randint(2, 12)
    who, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    return rng.choice((
        f"{who} buys {a} {thing} for ${c} each and pays with ${a * c + b}. How much change is there?",
        f"Solve for x: {c}x + {a} = {b}. Show every step.",
        f"A train travels {a * 10} km in {c} hours. What is its average speed, and how far does it get in {c + 3} hours?",
        f"What is {a}% of {b * 10}?",
        f"A rectangle is {a} cm long and {c} cm wide. Find its area and its perimeter.",
        f"There are {a} red and {b} blue {thing} in a bag. What is the probability of drawing a red one?",
        f"If f(x) = {c}x^2 - {a}x + 1, what is f({rng.randint(1, 5)})?",
        f"{who} has {b} {thing}, gives away a third of them and then gets {a} more. How many are there now?",
        f"Find the mean and the median of {', '.join(str(rng.randint(1, 60)) for _ in range(7))}.",
        f"The sum of two numbers is {a + b} and their difference is {abs(a - b)}. What are they?",
        f"A sum of ${b * 100} earns {c}% interest a year. What is it worth after 2 years?",
        f"How many ways are there to choose {min(c, 5)} {thing} out of {c + 5}?",
    ))  # fmt: skip


def coding(rng: random.Random) -> str:
    task = rng.choice(SUBJECTS["code"])
    language = rng.choice(("Python", "Python", "JavaScript", "Java", "C++", "Go", "C"))
    return rng.choice((
        f"Write a {language} function that {task}.",
        f"Write a {language} program that {task}. Explain how it works.",
        f"How would you write code in {language} that {task}? Add comments and an example.",
        f"Implement a {language} function that {task} and give its time complexity.",
        f"Write unit tests in {language} for a function that {task}.",
        f"My {language} function that {task} is too slow for large inputs. How can it be made faster? Show code.",
        f"Write an HTML page with a form about {rng.choice(SUBJECTS['daily'])} and a button that shows a message when clicked.",
        f"Write an SQL query that lists the {rng.choice(THINGS)} sold per month, most first, and explain it.",
    ))  # fmt: skip


def extraction(rng: random.Random) -> str:
    a, b = rng.sample(PEOPLE, 2)
    (city, country, tongue), (city2, country2, tongue2) = rng.sample(CITIES, 2)
    firm, firm2 = rng.sample(BUSINESS, 2)
    reviews = "\n".join(f"{i}. {text}" for i, text in enumerate(rng.sample(VERDICTS, 3), 1))
    year, money = rng.randint(1950, 2020), rng.randint(2, 90)
    records = "\n".join(
        f"{rng.choice(THINGS)},{rng.randint(1, 50)},{rng.randint(1, 20)}.50" for _ in range(4)
    )
    return rng.choice((
        f"Extract all names and places from this text as JSON: {a} met {b} in {city}, where {firm} opened an office in {year}. They later moved to {city2}.",
        f"Classify each review as positive, negative or neutral. Answer with one line per review.\n{reviews}",
        f"Turn this into a table with the columns city, country and language: In {city}, {country}, people speak {tongue}; in {city2}, {country2}, they speak {tongue2}.",
        f"From the following data, say which company earned more and by how much.\n{firm}, led by {a}: ${money} million in {year}\n{firm2}, led by {b}: ${money + 7} million in {year}",
        f"Given this CSV with item, quantity and price, compute the total of every line and return CSV.\nitem,quantity,price\n{records}",
        f"List every number in this sentence together with what it counts: {a} founded {firm} in {year} with {money} employees, {money // 2 + 1} of them in {city}.",
        f"Summarize in one sentence: {a} and {b} worked at {firm} for {money % 20 + 2} years. When the office in {city} closed, they started a school for {tongue2} in {city2}.",
        f"Which of these belong to {rng.choice(('science', 'history', 'art'))}? Answer with a list.\n" + "\n".join(rng.sample(SUBJECTS["science"] + SUBJECTS["society"], 5)),
        f"Rate each comment from 1 to 5 and give your answer as a JSON array.\n{reviews}",
        f"Read the text and answer: who owns {firm}?\n{firm} was founded by {a} in {year}. In {year + 5} it was sold to {b}, who moved it from {city} to {city2}.",
    ))  # fmt: skip


def science(rng: random.Random) -> str:
    return about(rng, rng.choice(SUBJECTS["science"]))


def humanities(rng: random.Random) -> str:
    return about(rng, rng.choice(SUBJECTS["society"]))


def about(rng: random.Random, subject: str) -> str:
    n = rng.choice(("three", "four", "five"))
    return rng.choice((
        f"Explain {subject} to a beginner.",
        f"What are the most important facts about {subject}? Give {n} and explain each.",
        f"How did our understanding of {subject} change over time?",
        f"Why does {subject} matter today? Give real-world examples.",
        f"Describe {subject} in detail, step by step where there are steps.",
        f"What are common misconceptions about {subject}?",
        f"Compare {subject} with {any_subject(rng)}.",
        f"Write a lesson plan on {subject} for two lessons of 45 minutes, with goals, activities and homework.",
        f"List {n} questions that an exam about {subject} could ask, with answers.",
        f"Discuss the advantages and disadvantages of different views on {subject}.",
        f"Suggest {n} books or films for somebody who wants to learn about {subject}, and say what each is about.",
        f"What is the relation between {subject} and the economy?",
        f"Summarize what is known about {subject} in one paragraph.",
    ))  # fmt: skip


def any_subject(rng: random.Random) -> str:
    return rng.choice(SUBJECTS["science"] + SUBJECTS["society"])


def main() -> None:
    number, rng = int(sys.argv[1]), random.Random(int(sys.argv[2]))
    seen: dict[str, None] = {}
    while len(seen) < number:
        seen[prompt(rng)] = None
    for text in seen:
        print(json.dumps({"prompt": text}))


if __name__ == "__main__":
    main()
