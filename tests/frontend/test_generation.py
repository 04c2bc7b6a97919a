"""Both endpoints over a real server, with the official client."""


async def test_hello(served):
    r = await served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}]
    )
    assert r.choices[0].message.content == "Hello, 你好 😀!"
    s = await served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    chunks = [c async for c in s]
    assert "".join(c.choices[0].delta.content for c in chunks) == "Hello, 你好 😀!"
