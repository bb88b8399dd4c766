import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Sends a body twice over one connection, with the JDK's defaults, and prints what comes back. */
public class JdkClient {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .header("Content-Type", "application/json")
            .POST(BodyPublishers.ofString(arguments[1]))
            .build();
        Pattern content = Pattern.compile("\"content\":\\s*\"([^\"]*)\"");
        for (int n = 0; n < 2; n++) {
            HttpResponse<String> answer = client.send(request, BodyHandlers.ofString());
            Matcher found = content.matcher(answer.body());
            String text = found.find() ? found.group(1) : answer.body();
            System.out.println(answer.statusCode() + " " + answer.version() + " " + text);
        }
    }
}
